"""Which keys each query reads: the one thing every selector makes and every executor runs.

A :class:`WindowIndex` is symbolic, two numbers over a layout. A :class:`BlockIndex` is a CSR list
of key blocks for every query block, per batch row and key-value head, maybe with single columns.
Blocks of 1 x 1 are plain token lists; a :class:`FullIndex` removes nothing.
Shapes: B = batch, G = key-value heads (either is 1 where all agree), Q = queries, K = keys.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.core.scores.attention import positional_window
from gossamer.kernels.attention_select import Tiling, block_lists
from gossamer.methods.attention.layout import MEMO, Layout

__all__ = ["BlockIndex", "FullIndex", "KeyIndex", "WindowIndex", "pairs_in_window"]


_ROWS = 256
"""Queries whose pairs are counted at a time."""


class KeyIndex(ABC):
    """The kept (query, key) pairs of one attention call; always inside the model's own mask."""

    layout: Layout

    @abstractmethod
    def mask(self, rows: slice | None = None) -> Tensor:
        """As bool (B, G, Q, K), or of some queries (B, G, q, K): the definition. Costs q * K."""

    def head_mask(self, rows: slice | None = None) -> Tensor:
        """As bool (B, G, R or 1, q, K): for an index whose query heads differ inside a group."""
        return self.mask(rows)[:, :, None]

    @property
    def maskable(self) -> bool:
        """Whether :meth:`mask` says it all; otherwise :meth:`attend` is the definition."""
        return True

    def attend(self, call: Any) -> Tensor:
        """(B, H, Q, E), the definition of attention under an index that no mask describes."""
        raise AssertionError(f"a mask defines attention under a {type(self).__name__}")

    @property
    def whole(self) -> bool:
        """Nothing is removed, known without counting."""
        return False

    def pairs(self) -> tuple[int, int]:
        """Pairs kept, and pairs the model itself lets through, over all rows and heads alike."""
        kept = own = heads = 0
        for start in range(0, self.layout.queries, _ROWS):
            rows = slice(start, min(start + _ROWS, self.layout.queries))
            part, seen = self.mask(rows), self.layout.mask(rows)
            batch, heads = max(len(part), len(seen)), part.shape[1]
            kept += int(part.sum()) * (batch // len(part))
            own += int(seen.sum()) * (batch // len(seen))
        return kept, own * heads


@dataclass(frozen=True, eq=False)
class FullIndex(KeyIndex):
    """Every pair the model itself lets through."""

    layout: Layout

    def mask(self, rows: slice | None = None) -> Tensor:
        return self.layout.mask(rows)

    @property
    def whole(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class WindowIndex(KeyIndex):
    """Each query keeps the first ``sink`` real tokens of its sequence and the latest ``recent``.

    A key after its query that the model itself shows (inside an image, for one) is kept.
    """

    layout: Layout
    sink: int
    recent: int

    @property
    def whole(self) -> bool:
        layout = self.layout
        last = layout.query_offset + layout.queries if layout.regular else layout.known
        return last <= self.sink + self.recent

    def keeps(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether pairs of absolute indices are kept; shapes as in :meth:`Layout.sees`."""
        layout = self.layout
        row = torch.arange(len(layout.position), device=layout.device).view(-1, 1, 1, 1)
        at, of = layout.position[row, query], layout.position[row, key]
        inside = ((at - of) < self.recent) | (of < self.sink)
        return layout.sees(query, key) & (at >= 0) & (of >= 0) & inside

    def mask(self, rows: slice | None = None) -> Tensor:
        name = ("window", self.sink, self.recent)
        memo = self.layout.memo
        if rows is not None or name not in memo:
            layout = self.layout
            query, key = layout.query_index, layout.key_index
            query = query if rows is None else query[rows]
            at, of = layout.position[:, query], layout.position[:, key]
            inside = positional_window(at, of, self.sink, self.recent)
            ahead = (of[:, None, :] > at[:, :, None]) & (at[:, :, None] >= 0)
            mask = layout.mask(rows) & (inside | ahead)[:, None]
            if rows is not None or mask.numel() > MEMO:
                return mask
            memo[name] = mask
        return memo[name]


@dataclass(frozen=True, eq=False)
class BlockIndex(KeyIndex):
    """Key blocks to read for every query block, in CSR per batch row and key-value head.

    Inside a listed block the model's own mask still applies, so a block on the diagonal is
    read in part. ``indptr`` and ``indices`` are what block-sparse kernels take. Beside the blocks,
    single columns may be read by every query; a pair that a block and a column both name is one.

    Parameters
    ----------
    block : (h, w), queries and keys of a block; blocks start at the call's first query and key.
    indptr : int64, (B, G, ceil(Q / h) + 1), offsets into ``indices``, running over all rows.
    indices : int64, key blocks, ascending within a query block.
    columns : int64, (B, G, C), key places counted from the call's first key, ascending, then -1;
        or None.
    """

    layout: Layout
    block: tuple[int, int]
    indptr: Tensor
    indices: Tensor
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        rows = -(-self.layout.queries // self.block[0])
        columns = -(-self.layout.keys // self.block[1])
        if self.indptr.dim() != 3 or self.indptr.shape[2] != rows + 1:
            raise GossamerError(
                f"indptr of {rows} query blocks is (batch, heads, {rows + 1}); "
                f"got {tuple(self.indptr.shape)}"
            )
        if self.columns is not None and self.columns.shape[:2] != self.indptr.shape[:2]:
            raise GossamerError(
                f"columns of shape {tuple(self.columns.shape)} do not fit block lists of "
                f"{tuple(self.indptr.shape[:2])} rows and heads"
            )
        # On a GPU the question would wait for the device at every call.
        if (
            self.indices.device.type == "cpu"
            and len(self.indices)
            and not 0 <= int(self.indices.min()) <= int(self.indices.max()) < columns
        ):
            raise GossamerError(
                f"a key block lies outside the {columns} blocks of {self.layout.keys} keys"
            )

    @classmethod
    def from_blocks(
        cls, layout: Layout, kept: Tensor, block: tuple[int, int], columns: Tensor | None = None
    ) -> "BlockIndex":
        """From a bool map (B, G, query blocks, key blocks), True where the block is read."""
        base = layout.query_offset - layout.key_offset
        tiling = Tiling(layout.queries, layout.keys, base, *block)
        return cls(layout, block, *block_lists(tiling, kept=kept), columns)

    @classmethod
    def from_index(cls, index: KeyIndex, block: tuple[int, int]) -> "BlockIndex":
        """The blocks that hold at least one kept pair: what a block-sparse kernel must visit."""
        (high, wide), mask = block, index.mask()
        pad = (0, -mask.shape[3] % wide, 0, -mask.shape[2] % high)
        grid = torch.nn.functional.pad(mask, pad)
        rows, columns = grid.shape[2] // high, grid.shape[3] // wide
        grid = grid.view(*mask.shape[:2], rows, high, columns, wide)
        return cls.from_blocks(index.layout, grid.any(5).any(3), block)

    def blocks(self, rows: slice | None = None) -> Tensor:
        """As a bool map (B, G, query blocks, key blocks), or of some query blocks."""
        columns = -(-self.layout.keys // self.block[1])
        part = slice(0, self.indptr.shape[2] - 1) if rows is None else rows
        begin, end = self.indptr[:, :, :-1][:, :, part], self.indptr[:, :, 1:][:, :, part]
        counts = end - begin
        flat = torch.zeros(counts.numel(), columns, dtype=torch.bool, device=self.indices.device)
        row = torch.arange(counts.numel(), device=self.indices.device)
        row = torch.repeat_interleave(row, counts.flatten())
        before = counts.flatten().cumsum(0) - counts.flatten()
        place = torch.arange(len(row), device=row.device) - before[row] + begin.flatten()[row]
        flat[row, self.indices[place]] = True
        return flat.view(*counts.shape, columns)

    def mask(self, rows: slice | None = None) -> Tensor:
        layout = self.layout
        at = torch.arange(layout.queries, device=layout.device)
        at = at if rows is None else at[rows]
        wanted = range(layout.queries)[rows or slice(None)]
        first = wanted[0] // self.block[0] if wanted else 0
        last = wanted[-1] // self.block[0] + 1 if wanted else 0
        spread = self.blocks(slice(first, last))[:, :, at // self.block[0] - first]
        spread = spread.repeat_interleave(self.block[1], 3)[..., : layout.keys]
        if self.columns is not None:
            named = torch.zeros(
                *self.columns.shape[:2], layout.keys + 1, dtype=torch.bool, device=spread.device
            )
            # Places of -1 fall on one more key, which is cut off.
            named.scatter_(2, self.columns % (layout.keys + 1), True)
            spread = spread | named[:, :, None, :-1]
        return spread & layout.mask(rows)

    def pairs(self) -> tuple[int, int]:
        if not self.layout.plain:
            return super().pairs()
        return self._plain_pairs()

    def _plain_pairs(self) -> tuple[int, int]:
        """:meth:`pairs` under causality alone, block by block instead of pair by pair."""
        layout = self.layout
        blocks = self.indptr.shape[2] - 1
        step = max(1, MEMO // (8 * self.indptr.shape[0] * self.indptr.shape[1] * layout.keys))
        step = max(step * self.block[1], 1)
        parts = (slice(at, min(at + step, blocks)) for at in range(0, blocks, step))
        kept = sum(self._pairs_of(part) for part in parts)
        reach = torch.arange(layout.queries) + 1 + layout.query_offset - layout.key_offset
        own = int(reach.clamp(0, layout.keys).sum())
        return kept, own * self.indptr.shape[0] * self.indptr.shape[1]

    def _pairs_of(self, blocks: slice) -> int:
        """Pairs that some query blocks keep."""
        layout, (high, wide) = self.layout, self.block
        listed = self.blocks(blocks)
        row = torch.arange(blocks.start, blocks.stop, device=listed.device)
        column = torch.arange(listed.shape[3], device=listed.device)
        first = layout.query_offset - layout.key_offset + row * high
        size = (layout.queries - row * high).clamp_max(high)
        width = (layout.keys - column * wide).clamp_max(wide)
        reach = first[:, None] - column * wide
        # The j-th query of a block reads min(reach + 1 + j, width) keys of it, if any.
        held = _ramp(reach + size[:, None], width) - _ramp(reach, width)
        kept = int((listed * held).sum())
        if self.columns is None:
            return kept
        there = self.columns >= 0
        place = self.columns.clamp_min(0)
        later = (first + size - torch.maximum(first, place[..., None])).clamp_min(0)
        later = later.clamp_max(size)
        named = (place // wide)[:, :, None].expand(-1, -1, len(row), -1)
        covered = listed.gather(3, named).transpose(2, 3)
        return kept + int((later * ~covered * there[..., None]).sum())


def _ramp(count: Tensor, width: Tensor) -> Tensor:
    """Sum of min(i, width) for i = 1 .. count; 0 for counts below 1."""
    count = count.clamp_min(0)
    inside = torch.minimum(count, width)
    return inside * (inside + 1) // 2 + (count - inside) * width


def pairs_in_window(length: int, sink: int, recent: int, own: int | None = None) -> tuple[int, int]:
    """Pairs kept and pairs a layer itself reads, for one sequence of a length.

    Parameters
    ----------
    own : the layer's own sliding window (latest keys it sees, the query's included), or None.

    >>> pairs_in_window(6, sink=1, recent=2)
    (15, 21)
    """
    query = torch.arange(length)
    reach = query + 1 if own is None else (query + 1).clamp_max(own)
    near = reach.clamp_max(recent)
    oldest, before = query + 1 - reach, query + 1 - near
    sinks = (before.clamp_max(sink) - oldest).clamp_min(0)
    return int((near + sinks).sum()), int(reach.sum())
