"""The index of attention that decides while it runs: a tile is skipped if all of it is small.

A tile of scores is skipped when in every row its largest score lies below the largest score seen
so far by more than -ln(lambda). Tiles are visited in a fixed order: the one with the sequence's
first key and those that reach the diagonal first, which are never skipped; then the others from
left to right. A skipped tile does not change the largest score, so the order alone decides.

The rows of a tile are consecutive queries of one query head; when a single token is decoded they
are the heads that share keys, and the first and last tile only set the score to beat.
Shapes: B = batch, G = key-value heads, R = query heads per key-value head, Q = queries, K = keys,
h, w = queries and keys of a tile, n, m = query and key tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.layout import Layout

__all__ = ["ThresholdIndex", "tile_gaps"]


@dataclass(frozen=True, eq=False)
class ThresholdIndex(KeyIndex):
    """The tiles of a call that hold a score near enough to the largest before them.

    Parameters
    ----------
    layout, call : where queries and keys stand, and what they are.
    threshold : lambda per row of the batch, (B or 1,), each 0 to 1; 0 skips nothing.
    block : (h, w), queries and keys of a tile.
    """

    layout: Layout
    call: Call
    threshold: Tensor
    block: tuple[int, int]

    @property
    def whole(self) -> bool:
        return not bool((self.threshold > 0).any())

    @property
    def maskable(self) -> bool:
        return False

    @cached_property
    def skipped(self) -> Tensor:
        """(B, G, R, n, m) bool; tiles no query reads are not skipped but absent: False."""
        return torch.stack([skip for _, _, skip in self._tiles()], dim=3)

    def _tiles(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, masked scores (B, G, R, h, K), and skipped key tiles (B, G, R, m)."""
        cut = self.threshold.to(self.call.exact).log().view(-1, 1, 1, 1)
        for rows, score in tile_scores(self.call, self.layout, self.block[0]):
            yield rows, score, tile_gaps(score, self.layout, rows, self.block[1]) < cut

    def head_mask(self, rows: slice | None = None) -> Tensor:
        at = torch.arange(self.layout.queries, device=self.layout.device)
        at = at if rows is None else at[rows]
        kept = ~self.skipped[:, :, :, at // self.block[0]]
        kept = kept.repeat_interleave(self.block[1], 4)[..., : self.layout.keys]
        return kept & self.layout.mask(rows)[:, :, None]

    def mask(self, rows: slice | None = None) -> Tensor:
        """What at least one of the heads that share keys reads."""
        return self.head_mask(rows).any(2)

    def pairs(self) -> tuple[int, int]:
        layout, size = self.layout, self.block
        heads = self.call.query.shape[1]
        kept = own = 0
        for tile, start in enumerate(range(0, layout.queries, size[0])):
            seen = layout.mask(slice(start, min(start + size[0], layout.queries)))
            seen = functional.pad(seen, (0, -layout.keys % size[1])).unflatten(3, (-1, size[1]))
            held = seen.sum((2, 4)).expand(len(self.skipped), 1, -1)[:, :, None]
            own += int(held.sum()) * heads
            kept += int((held * ~self.skipped[:, :, :, tile]).sum())
        return kept, own

    def attend(self, call: Call) -> Tensor:
        """(B, H, Q, E): softmax written out over the tiles that are not skipped."""
        parts = []
        value = call.value.to(call.exact)
        for _, score, skip in self._tiles():
            gone = skip.repeat_interleave(self.block[1], 3)[..., : score.shape[-1]]
            score = score.masked_fill(gone[:, :, :, None], -torch.inf)
            if call.sink_logits is not None:
                extra = call.sink_logits.to(score).view(1, *score.shape[1:3], 1, 1)
                score = torch.cat([score, extra.expand(*score.shape[:-1], 1)], dim=-1)
            weight = torch.softmax(score, dim=-1).nan_to_num(0.0)[..., : value.shape[2]]
            weight = functional.dropout(weight, call.dropout, training=call.dropout > 0)
            parts.append(torch.einsum("bgrqk,bgke->bgrqe", weight, value))
        return torch.cat(parts, dim=3).flatten(1, 2).to(call.query.dtype)


def tile_scores(call: Call, layout: Layout, high: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows and masked scores (B, G, R, h, K) of every tile of queries."""
    query, key = call.grouped_query(), call.key.to(call.exact)
    for start in range(0, layout.queries, high):
        rows = slice(start, min(start + high, layout.queries))
        part = query[:, :, :, rows].to(call.exact) * call.factor
        score = torch.einsum("bgrqd,bgkd->bgrqk", part, key)
        if call.softcap is not None:
            score = call.softcap * torch.tanh(score / call.softcap)
        yield rows, score.masked_fill(~layout.mask(rows)[:, :, None], -torch.inf)


def tile_gaps(score: Tensor, layout: Layout, rows: slice, wide: int) -> Tensor:
    """How far each key tile lies below the largest score before it, in its best row.

    Parameters
    ----------
    score : (B, G, R, h, K), masked, of the queries ``rows``. wide : keys of a tile.

    Returns
    -------
    (B, G, R, m), natural logarithms: a tile is skipped where this is below ln(lambda). Above 0 for
    tiles that are never skipped, and for those no row reads.
    """
    keys = score.shape[-1]
    tiles = functional.pad(score, (0, -keys % wide), value=-torch.inf)
    most = tiles.unflatten(4, (-1, wide)).amax(-1)
    place = torch.arange(most.shape[-1], device=score.device)
    base = layout.query_offset - layout.key_offset + rows.start
    begin = (layout.first - layout.key_offset).clamp(0, keys - 1).view(-1, 1, 1, 1, 1) // wide
    first = place == begin
    decoding = layout.queries == 1
    # The first row's own key ends the tiles that every row may read whole.
    last = place >= (base // wide if decoding else (base + 1) // wide)
    lead = most.masked_fill(~(first | last), -torch.inf).amax(-1, keepdim=True)
    before = most.cummax(-1).values.roll(1, -1)
    before[..., 0] = -torch.inf
    largest = torch.maximum(before, lead).clamp_min(torch.finfo(score.dtype).min / 4)
    # The heads that share keys decode together.
    gap = (most - largest).amax((2, 3) if decoding else (3,), keepdim=True)[..., 0, :]
    gap = gap.expand(-1, -1, score.shape[2], -1)
    absent = (most == -torch.inf).all(3)
    if not decoding:
        absent = absent | (first | last).squeeze(3).expand_as(absent)
    return gap.masked_fill(absent, torch.inf)
