"""The blocks of one attention call: which exist, which a band or a diagonal touches.

Blocks start at the call's first query and first key. A place is a key counted from there.
Shapes: B = batch, G = key-value heads, K = keys, n = query blocks, m = key blocks.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gossamer.methods.attention.layout import Layout

__all__ = ["Grid"]


@dataclass(frozen=True, eq=False)
class Grid:
    """Query and key blocks of a call.

    Parameters
    ----------
    layout : where the call's queries and keys stand. high, wide : queries and keys of a block.
    """

    layout: Layout
    high: int
    wide: int

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return -(-self.layout.queries // self.high), -(-self.layout.keys // self.wide)

    @property
    def base(self) -> int:
        """Place of the first query."""
        return self.layout.query_offset - self.layout.key_offset

    @property
    def end(self) -> int:
        """One more than the place of the last query: keys from there on are not written yet."""
        return min(self.base + self.layout.queries, self.layout.keys)

    @cached_property
    def first(self) -> Tensor:
        """(n,) place of each query block's first query."""
        return self.base + self.high * torch.arange(self.shape[0], device=self.layout.device)

    @cached_property
    def last(self) -> Tensor:
        """(n,) place of each query block's last query."""
        return (self.first + self.high - 1).clamp_max(self.base + self.layout.queries - 1)

    @cached_property
    def start(self) -> Tensor:
        """(m,) place of each key block's first key."""
        return self.wide * torch.arange(self.shape[1], device=self.layout.device)

    @cached_property
    def causal(self) -> Tensor:
        """(n, m): the block's first key is not after the last query."""
        return self.start <= self.last[:, None]

    @cached_property
    def real(self) -> Tensor | None:
        """(B, K): keys that are no padding; None when all are."""
        padding = self.layout.padding
        if padding is None:
            return None
        return padding[:, self.layout.key_offset : self.layout.key_offset + self.layout.keys]

    @cached_property
    def seen(self) -> Tensor:
        """(B or 1, 1, n, m): causal blocks with a key that is no padding."""
        if self.real is None:
            return self.causal[None, None]
        pad = -self.layout.keys % self.wide
        some = torch.nn.functional.pad(self.real, (0, pad))
        some = some.view(len(some), -1, self.wide).any(-1)
        return self.causal & some[:, None, None]

    @cached_property
    def begin(self) -> Tensor:
        """(B or 1,) place of each row's first real key."""
        return (self.layout.first - self.layout.key_offset).clamp(0, self.layout.keys - 1)

    def head(self, count: int) -> Tensor:
        """(B or 1, 1, n, m): causal blocks that hold one of a row's first ``count`` real keys."""
        begin = self.begin.view(-1, 1, 1, 1)
        touched = (self.start + self.wide > begin) & (self.start < begin + count)
        return touched & self.causal

    def band(self, recent: int) -> Tensor:
        """(n, m): blocks that hold one of the latest ``recent`` keys of one of their queries."""
        oldest = (self.first - recent + 1)[:, None]
        return self.causal & (self.start + self.wide > oldest)

    def diagonals(self, kept: Tensor) -> Tensor:
        """Blocks that a set of distances touches.

        Parameters
        ----------
        kept : bool, (B, G, K), entry o is True where keys o places before the query are read.

        Returns
        -------
        bool, (B, G, n, m), causal blocks with at least one such pair.
        """
        if self.high != self.wide:
            raise AssertionError("diagonals of blocks are defined for square blocks")
        rows, columns = self.shape
        below = torch.nn.functional.pad(kept.cumsum(-1, dtype=torch.int32), (1, 0))
        # Query block i and key block j hold the distances base + (i - j) * wide +- (wide - 1).
        apart = torch.arange(-(columns - 1), rows, device=kept.device) * self.wide + self.base
        low = (apart - self.wide + 1).clamp(0, kept.shape[-1])
        high = (apart + self.wide).clamp(0, kept.shape[-1])
        hit = below[..., high] > below[..., low]
        # Row i of the map is the stretch of ``hit`` that runs backwards from i - j = i.
        return hit.flip(-1).unfold(-1, columns, 1).flip(-2) & self.causal

    def diagonal_of(self, block_distance: int) -> Tensor:
        """(n, m): blocks so many blocks before the one that holds the last query of the row."""
        own = (self.last // self.wide)[:, None]
        return torch.arange(self.shape[1], device=own.device) == own - block_distance
