"""FlexPrefill: let every head decide, for every prompt, how much of it to read.

The attention of the last block of queries is computed in full. Where block means alone predict
it, the head's blocks are scored by block means; otherwise the head reads the columns and the
diagonals that the last queries read. Either way, as many blocks are kept as it takes to reach a
share gamma of the estimated mass: easy heads and easy prompts read less.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.core.scores.attention_estimate import (
    block_weights,
    diagonal_blocks,
    jensen_shannon,
    mass_count,
)
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.estimate import (
    Grid,
    Tail,
    covered_lists,
    covering,
    means,
    tail_mass,
    tails,
)
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import BlockIndex, FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.ranked import first_ranks
from gossamer.methods.attention.selector import Selector
from gossamer.models import State

__all__ = ["FlexPrefill"]

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class FlexSelector(Selector):
    """Blocks that cover a share of the mass, by query-aware scores or columns and diagonals.

    Attributes
    ----------
    gamma, tau, block_size, budget_tokens : as in :class:`FlexPrefill`.
    """

    gamma: float
    tau: float
    block_size: int
    budget_tokens: int

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        block = self.block_size
        if self.gamma >= 1.0 or layout.end <= max(2 * block, self.budget_tokens):
            return FullIndex(layout)
        lists = covered_lists(call, layout, block, self.gamma, self.tau, self._least)
        if lists is not None:
            return BlockIndex(layout, (block, block), *lists)
        grid = Grid(layout, block, block)
        mean_key = means(call.key, block, grid.real)
        batch, shared = call.key.shape[:2]
        kept = torch.zeros(batch, shared, *grid.shape, dtype=torch.bool, device=layout.device)
        aware = torch.zeros(batch, shared, dtype=torch.bool, device=layout.device)
        for tail in tails(call, layout, block):
            part = self._columns_and_diagonals(call, grid, tail, mean_key[tail.rows])
            kept[tail.rows], aware[tail.rows] = part
        self._add_blocks(call, grid, mean_key, aware, kept)
        always = grid.head(1) | grid.band(1)
        return BlockIndex.from_blocks(layout, (kept | always) & grid.seen, (block, block))

    @property
    def _least(self) -> int:
        """Fewest columns, and diagonals, of blocks."""
        return -(-self.budget_tokens // self.block_size)

    def query_aware(self, call: Call, layout: Layout) -> Tensor:
        """(B, G): heads whose block means predict what the last queries read."""
        grid = Grid(layout, self.block_size, self.block_size)
        mean_key = means(call.key, self.block_size, grid.real)
        parts = [
            self._trusted(call, grid, tail, mean_key[tail.rows])[0]
            for tail in tails(call, layout, self.block_size)
        ]
        return torch.cat(parts)

    def _trusted(
        self, call: Call, grid: Grid, tail: Tail, mean_key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Whether heads are query-aware (b, G); true mass by key block (b, G, m) and by distance.

        Rows may end before the last key block: what lies beyond has no mass.
        """
        vertical, slash = tail_mass(call, grid.layout, tail)
        beyond = grid.shape[1] * grid.wide - vertical.shape[-1]
        by_block = torch.nn.functional.pad(vertical, (0, beyond)).unflatten(-1, (-1, grid.wide))
        by_block = by_block.sum(-1)
        visible = (by_block > 0).any(1, keepdim=True)[:, :, None]
        guess = block_weights(
            tail.query.mean(3, keepdim=True), mean_key, call.factor, visible, call.softcap
        )
        aware = jensen_shannon(guess[:, :, 0], by_block) < self.tau
        return aware, by_block, slash

    def _columns_and_diagonals(
        self, call: Call, grid: Grid, tail: Tail, mean_key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Blocks (b, G, n, m) in columns and diagonals that cover gamma, and who is query-aware."""
        aware, vertical, slash = self._trusted(call, grid, tail, mean_key)
        whole, slash = slash.sum(-1), diagonal_blocks(slash, grid.wide)
        # A row's own diagonals end where its padding begins.
        begin = grid.begin[tail.rows] if len(grid.begin) > 1 else grid.begin
        reach = (tail.key.shape[2] - begin + grid.wide - 1) // grid.wide
        last = (reach - 1).view(-1, 1, 1).expand(len(slash), slash.shape[1], 1)
        there = torch.arange(slash.shape[-1], device=slash.device) <= last
        slash = slash.masked_fill(~there, 0.0)
        # What seemed to cross the last one cannot: the first keys lie in its corner.
        slash = slash.scatter_add(-1, last, (whole - slash.sum(-1))[..., None])
        columns, diagonals = (self._covering(mass, aware) for mass in (vertical, slash))
        diagonals = torch.nn.functional.pad(diagonals, (0, grid.shape[1] - diagonals.shape[-1]))
        kept = columns[:, :, None, :].expand(-1, -1, grid.shape[0], -1).clone()
        column = torch.arange(grid.shape[1], device=kept.device)
        # A block of queries that straddles two key blocks has two diagonals.
        aligned = grid.base % grid.wide == 0
        for own in (grid.first,) if aligned else (grid.first, grid.last):
            apart = (own // grid.wide)[:, None] - column
            kept |= diagonals[:, :, apart.clamp_min(0)] & (apart >= 0)
        return kept, aware

    def _covering(self, mass: Tensor, aware: Tensor) -> Tensor:
        """The fewest entries (b, G, n) that reach gamma; the least budget for query-aware heads."""
        count = mass_count(mass, self.gamma).clamp_min(self._least)
        count = torch.where(aware, self._least, count)
        return first_ranks(mass, count[..., None])

    def _add_blocks(
        self, call: Call, grid: Grid, mean_key: Tensor, aware: Tensor, kept: Tensor
    ) -> None:
        """Add, for query-aware heads, the best pooled blocks of the whole map."""
        padding = grid.layout.padding
        first = grid.layout.query_offset
        real = None if padding is None else padding[:, first : first + grid.layout.queries]
        for group in aware.any(0).nonzero()[:, 0].tolist():
            one = slice(group, group + 1)
            mean_query = means(call.grouped_query()[:, one], grid.high, real)
            weights = block_weights(
                mean_query, mean_key[:, one], call.factor, grid.seen, call.softcap
            )[:, 0].flatten(1)
            share = weights / weights.sum(1, keepdim=True).clamp_min(_TINY)
            chosen = covering(share, self.gamma, first_ranks)
            kept[:, group] |= chosen.view(-1, *grid.shape) & aware[:, group, None, None]

    def state(self) -> State:
        return State(asdict(self))

    def notes(self) -> tuple[str, ...]:
        return (
            f"blocks of {self.block_size} that reach {self.gamma:g} of the mass the last "
            f"{self.block_size} queries read; decoding is full",
            f"prompts of at most {max(2 * self.block_size, self.budget_tokens)} tokens stay full",
        )


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(AttentionMethod):
    """Read, in every head, as few blocks of the prompt as cover a share of its attention.

    Parameters
    ----------
    gamma : share of the estimated attention mass to keep, in (0, 1]; 0.95 is the paper's setting
        for quality. At 1 nothing is removed.
    tau : a head is query-aware when the Jensen-Shannon distance between its pooled and its true
        attention of the last block is below it; 0 makes every head read columns and diagonals.
    block_size : queries and keys of a block, and how many last queries are looked at.
    budget_tokens : fewest keys' worth of columns, and of diagonals, that a head reads. Prompts of
        at most so many tokens, or of two blocks, stay full.

    The heads that share keys share the choice: their probabilities are averaged. Decoding is
    full; combine with a method for it: ``FlexPrefill() + Quest()``.

    Source: arXiv:2502.20766, Algorithms 1 to 4.
    Departs from the paper: budgets are counted in blocks, where the paper's code counts tokens
    and divides by the block size, which can keep less than gamma; the mass at a distance is
    shared between the two block diagonals it crosses; heads of a group share their blocks. A
    learned sink takes no part in the estimate.

    Examples
    --------
    >>> FlexPrefill(gamma=0.95).gamma
    0.95
    """

    card: ClassVar = Card(
        title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient "
        "Long-Sequence Inference",
        system="flexprefill",
        year=2025,
        arxiv="2502.20766",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores of prompts",
        score="attention of the last block of queries by key and distance, or of block means",
        pattern="square blocks in columns and diagonals, or anywhere",
        budget="share gamma of the estimated mass",
        schedule="every prefill call",
        kernel="block-sparse attention",
        departs="budgets counted in blocks, not in tokens divided by the block size; the mass at "
        "a distance shared by the two block diagonals it crosses; heads of a group share blocks",
    )
    phases: ClassVar = frozenset({"prefill"})
    full: ClassVar = {"gamma": 1.0}
    example: ClassVar = {"gamma": 0.8, "block_size": 4, "budget_tokens": 4}
    peeks: ClassVar = "blocks of all queries are chosen by what the last queries of the call read"
    chunked: ClassVar = "estimates come from the last block of queries of each chunk"
    exempt: ClassVar = {
        "dense at sparsity 0": "it has no sparsity: gamma sets a mass",
        "encoders": "the last queries of a decoder see all keys; an encoder has no last query",
    }

    gamma: float = 0.9
    tau: float = 0.1
    block_size: int = 128
    budget_tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.gamma <= 1.0:
            raise GossamerError(f"gamma is {self.gamma}; give a share above 0 and at most 1")
        if not self.tau >= 0.0:
            raise GossamerError(f"tau is {self.tau}; give a distance of at least 0")
        check_count("block_size", self.block_size, 1)
        check_count("budget_tokens", self.budget_tokens, 1)

    def plan(self, model: nn.Module, data: Any, length: int) -> FlexSelector:
        return FlexSelector(self.gamma, self.tau, self.block_size, self.budget_tokens)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FlexSelector:
        return FlexSelector(meta["gamma"], meta["tau"], meta["block_size"], meta["budget_tokens"])
