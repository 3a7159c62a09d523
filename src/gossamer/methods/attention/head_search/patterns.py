"""Where the pattern of a head lies in the prompt at hand.

Which columns, diagonals or blocks a head reads is estimated anew at every call: from the last
queries, or from block means. The estimates are made once per call, whatever needs them.
Shapes: B = batch, G = key-value heads, n = query blocks, m = key blocks, C = columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.core.scores.attention_estimate import block_weights
from gossamer.methods.attention.estimate import (
    Grid,
    last_mass,
    line_lists,
    means,
    on_device,
    plain,
    plain_share,
)
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.head_search.heads import Head
from gossamer.methods.attention.index import BlockIndex, FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout

__all__ = ["Online"]

_FAR = 1 << 30
"""More tokens than any prompt has."""


@dataclass(frozen=True, eq=False)
class Online:
    """The patterns of one call's heads.

    Parameters
    ----------
    call, layout : the prompt. block_size : queries and keys of a block.
    last_queries : how many last queries are looked at.
    sink, local : first keys, and nearest distances, that columns and diagonals always hold.
    """

    call: Call
    layout: Layout
    block_size: int
    last_queries: int
    sink: int
    local: int

    @cached_property
    def grid(self) -> Grid:
        """Blocks of the call."""
        return Grid(self.layout, self.block_size, self.block_size)

    @cached_property
    def _mass(self) -> tuple[Tensor, Tensor]:
        return last_mass(self.call, self.layout, self.last_queries)

    @cached_property
    def column_scores(self) -> Tensor:
        """(B, G, K) mass by key place; infinite for those always read, -1 for none."""
        vertical = self._mass[0]
        place = torch.arange(vertical.shape[-1], device=vertical.device)
        begin = self.grid.begin.view(-1, 1, 1)
        forced = (place >= begin) & (place < begin + self.sink)
        # What lies in the padding or after the last query is never worth a column.
        there = (place >= begin) & (place < self.grid.end)
        return vertical.masked_fill(forced, torch.inf).masked_fill(~there, -1.0)

    @cached_property
    def distance_scores(self) -> Tensor:
        """(B, G, K) mass by distance; infinite for the nearest."""
        slash = self._mass[1]
        near = torch.arange(slash.shape[-1], device=slash.device) < self.local
        return slash.masked_fill(near, torch.inf)

    @cached_property
    def blocks_by_mean(self) -> Tensor:
        """(B, G, n, m) attention between block means; -1 where nothing is seen."""
        grid, layout = self.grid, self.layout
        found = plain_share(self.call, layout, self.block_size)
        if found is not None:
            return found[0].masked_fill(~grid.seen, -1.0)
        real = None
        if layout.padding is not None:
            first = layout.query_offset
            real = layout.padding[:, first : first + layout.queries]
        key = means(self.call.key, self.block_size, grid.real)
        parts = []
        query = self.call.grouped_query()
        # One group at a time: its block means and their scores are what is held.
        for group in range(key.shape[1]):
            one = slice(group, group + 1)
            mean = means(query[:, one], self.block_size, real)
            parts.append(
                block_weights(mean, key[:, one], self.call.factor, grid.seen, self.call.softcap)
            )
        return torch.cat(parts, dim=1).masked_fill(~grid.seen, -1.0)

    def blocks(self, head: Head) -> Tensor:
        """(B or 1, G or 1, n, m): the blocks a pattern reads, if all heads had it."""
        grid = self.grid
        if head.kind == "a_shape":
            return (grid.head(head.first) | grid.band(head.second)) & grid.seen
        if head.kind == "block_sparse":
            score = self.blocks_by_mean
            return _largest(score, max(1, head.first)) & grid.seen
        if head.kind == "dense":
            return grid.seen
        named = _largest(self.distance_scores, max(head.second, self.local))
        return grid.diagonals(named) & grid.seen

    def columns(self, head: Head) -> Tensor | None:
        """(B, G, C) ascending key places that a pattern reads beside its blocks."""
        if head.kind != "vertical_slash":
            return None
        count = min(max(head.first, self.sink), self.grid.end)
        return _best(self.column_scores, count).sort(dim=-1).values

    def of_all(self, head: Head) -> KeyIndex:
        """The index if all heads had the same pattern."""
        if head.kind == "dense":
            return FullIndex(self.layout)
        batch, shared = self.call.key.shape[:2]
        if self._plain:
            return self._lists([[head]] * shared)
        kept = self.blocks(head).expand(batch, shared, -1, -1)
        size = (self.block_size, self.block_size)
        return BlockIndex.from_blocks(self.layout, kept, size, self.columns(head))

    def index(self, heads: Sequence[Sequence[Head]]) -> KeyIndex:
        """The index of all heads.

        Parameters
        ----------
        heads : of every key-value head, the patterns of the query heads that share it: what any
            of them names is read.
        """
        if all(head.kind == "dense" for group in heads for head in group):
            return FullIndex(self.layout)
        if self._plain:
            return self._lists(heads)
        if len({tuple(set(group)) for group in heads}) == 1 and len(set(heads[0])) == 1:
            return self.of_all(heads[0][0])
        batch, shared = self.call.key.shape[:2]
        kept = torch.zeros(
            batch, shared, *self.grid.shape, dtype=torch.bool, device=self.layout.device
        )
        named: list[Tensor | None] = [None] * shared
        for head in dict.fromkeys(head for group in heads for head in group):
            blocks, columns = self.blocks(head), self.columns(head)
            for group in range(shared):
                if head not in heads[group]:
                    continue
                kept[:, group] |= blocks[:, group if blocks.shape[1] > 1 else 0]
                if columns is not None:
                    named[group] = _union(named[group], columns[:, group])
        return BlockIndex.from_blocks(
            self.layout, kept, (self.block_size, self.block_size), _stack(named, batch)
        )

    @cached_property
    def _plain(self) -> bool:
        """Whether kernels go from the call to its lists."""
        return plain(self.call, self.layout, min(self.last_queries, self.layout.queries))

    def _lists(self, heads: Sequence[Sequence[Head]]) -> BlockIndex:
        """By the kernels: every pattern but blocks by mean is columns and diagonals."""
        size = (self.block_size, self.block_size)
        wanted = [self._wanted(group) for group in heads]
        if any(one[0] or one[1] for one in wanted):
            mass = self._mass
        else:
            # Windows alone ask for no estimate.
            none = self.call.key.new_zeros(*self.call.key.shape[:2], 1, dtype=torch.float32)
            mass = none, none
        indptr, indices, columns = line_lists(
            *(mass, self.layout, self.block_size, wanted),
            *(self.sink, self.local, self._named_blocks(heads)),
        )
        return BlockIndex(self.layout, size, indptr, indices, columns)

    def _wanted(self, group: Sequence[Head]) -> tuple[int, int, int, int]:
        """Columns, distances, first blocks and latest keys that a group's patterns name."""
        lines = [head for head in group if head.kind == "vertical_slash"]
        window = [head for head in group if head.kind == "a_shape"]
        recent = max((head.second for head in window), default=-_FAR)
        return (
            max((min(max(head.first, self.sink), self.grid.end) for head in lines), default=0),
            max((min(max(head.second, self.local), self.grid.end) for head in lines), default=0),
            max((-(-head.first // self.block_size) for head in window), default=0),
            _FAR if any(head.kind == "dense" for head in group) else min(recent, _FAR),
        )

    def _named_blocks(self, heads: Sequence[Sequence[Head]]) -> Tensor | None:
        """(B, G, n, m) blocks by mean that patterns name; None where none does."""
        kept: Tensor | None = None
        for head in dict.fromkeys(head for group in heads for head in group):
            if head.kind != "block_sparse":
                continue
            own = tuple(int(head in group) for group in heads)
            best = self.blocks(head) & (on_device(own, self.layout.device) > 0)[:, None, None]
            kept = best if kept is None else kept | best
        return kept


def _best(score: Tensor, count: int) -> Tensor:
    """(..., count) places of the largest scores.

    Ties go to the lower place, except on a GPU, where a stable sort of all would cost more than
    the attention it saves.
    """
    count = min(count, score.shape[-1])
    if score.is_cuda:
        return score.topk(count, dim=-1).indices
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _largest(score: Tensor, count: int) -> Tensor:
    """bool, same shape: the ``count`` largest scores of every row."""
    none = torch.zeros_like(score, dtype=torch.bool)
    return none.scatter_(-1, _best(score, count), True)


def _union(first: Tensor | None, second: Tensor) -> Tensor:
    """Of two choices (B, C) by falling mass the larger holds the smaller."""
    return second if first is None or first.shape[1] < second.shape[1] else first


def _stack(named: Sequence[Tensor | None], batch: int) -> Tensor | None:
    """(B, G, C) from each head's own columns, filled up with -1; None without any."""
    given = [one for one in named if one is not None]
    if not given:
        return None
    width = max(one.shape[1] for one in given)
    none = given[0].new_empty(batch, 0)
    filled = [
        functional.pad(one, (0, width - one.shape[1]), value=-1)
        for one in (none if one is None else one for one in named)
    ]
    return torch.stack(filled, dim=1)
