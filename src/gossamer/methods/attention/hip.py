"""HiP: find the best keys by a tree search, as if keys close together scored alike.

The prompt is cut into as many stretches as keys may be kept. Every stretch is halved, one key in
the middle of each half is scored, and the best halves stay, until a half is a single key block.
A query block looks at O(k log T) keys instead of T.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, check_count
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.estimate import Grid, tree_top_blocks
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.models import State

__all__ = ["HiP"]

_NONE = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class TreeSelector(Selector):
    """Blocks found by a tree search, a window and the first keys.

    Attributes
    ----------
    budget_tokens, block_size, key_block, query_stride, local, sink, refresh : as in :class:`HiP`.
    """

    stateful: ClassVar[bool] = True

    budget_tokens: int
    block_size: int
    key_block: int
    query_stride: int
    local: int
    sink: int
    refresh: int

    def select(self, call: Call, layout: Layout, layer: int) -> BlockIndex:
        high = min(self.block_size, layout.queries)
        grid = Grid(layout, high, self.key_block)
        if layout.phase == "prefill":
            call.state.clear()
            found = self.search(call, grid)
        else:
            found = self._remembered(call, grid)
        return self._listed(grid, found)

    def search(self, call: Call, grid: Grid) -> Tensor:
        """(B, G, n, k) key blocks of every block of queries."""
        layout, high = grid.layout, grid.high
        query = call.grouped_query()
        pad, newest = -layout.queries % high, layout.queries - 1
        # The last block is filled up with its last query.
        at = torch.arange(layout.queries + pad, device=query.device).clamp_max(newest)
        at = at.view(-1, high)
        # Every stride-th query of a block speaks for it, and the last, which sees the most.
        at = torch.cat([at[:, :: self.query_stride], at[:, -1:]], dim=1)
        spoken = query[:, :, :, at].permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
        place = (at + grid.base).repeat(1, query.shape[2])
        keep = max(1, self.budget_tokens // self.key_block)
        found = tree_top_blocks(spoken, place, call.key, grid.begin, keep, self.key_block)
        return found.blocks

    def _remembered(self, call: Call, grid: Grid) -> Tensor:
        """The blocks of the latest search, or of a new one when that is too old."""
        state, end, offset = call.state, grid.layout.end, grid.layout.key_offset
        # A cache that drops its oldest keys moves the others, and with them the blocks.
        moved = offset - state.facts.get("offset", offset)
        if state.seen == 0 or end - state.seen >= self.refresh or moved % grid.wide:
            # All queries of the call share one search: they are few.
            found = self.search(call, Grid(grid.layout, grid.layout.queries, grid.wide))
            state.tensors["blocks"], state.seen = found[:, :, 0], end
            state.facts["offset"], moved = offset, 0
        rows = grid.shape[0]
        blocks = (state.tensors["blocks"] - moved // grid.wide).clamp_min(-1)
        return blocks[:, :, None].expand(-1, -1, rows, -1)

    def _listed(self, grid: Grid, found: Tensor) -> BlockIndex:
        """The index of the found blocks, the window's and the first keys'."""
        batch, shared, rows = found.shape[:3]
        size = grid.wide
        near = torch.arange(-(-(self.local + grid.high) // size) + 1, device=found.device)
        oldest = (grid.first - self.local + 1).clamp_min(0)[:, None] // size
        window = (oldest + near).masked_fill(oldest + near > grid.last[:, None] // size, _NONE)
        first = grid.begin[:, None] // size + torch.arange(
            -(-self.sink // size), device=found.device
        )
        sinks = first[:, None, None].expand(batch, shared, rows, -1)
        sinks = sinks.masked_fill(sinks > (grid.last // size)[:, None], _NONE)
        window = window.expand(batch, shared, -1, -1)
        found = found.masked_fill(found < 0, _NONE)
        every = torch.cat([found, window, sinks], dim=-1).sort(dim=-1).values
        new = torch.ones_like(every, dtype=torch.bool)
        new[..., 1:] = every[..., 1:] > every[..., :-1]
        new &= every < grid.shape[1]
        counts = new.sum(-1)
        ends = counts.flatten().cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]]).view(counts.shape)
        indptr = torch.cat([starts, ends.view(counts.shape)[..., -1:]], dim=-1)
        return BlockIndex(grid.layout, (grid.high, size), indptr, every[new])

    def state(self) -> State:
        return State(asdict(self))

    def notes(self) -> tuple[str, ...]:
        return (
            f"tree search for {self.budget_tokens} keys per {self.block_size} queries, the latest "
            f"{self.local} and the first {self.sink}; in decoding a search serves {self.refresh} "
            "tokens",
        )


@dataclass(frozen=True, kw_only=True)
class HiP(AttentionMethod):
    """Find every query block's best keys by halving stretches of the prompt.

    Parameters
    ----------
    budget_tokens : keys the search keeps for every block of queries.
    block_size : queries that share a search. key_block : keys kept or dropped as one.
    query_stride : every so-manieth query of a block speaks for it, and the last one.
    local, sink : latest and first keys that are always read.
    refresh : decoded tokens one search serves; the window moves with every token.
    dense_layers : first layers left full; they attend too broadly.

    A search assumes that keys close together score alike. On keys without that it finds little
    more than chance would.

    Source: arXiv:2406.09827, Algorithms 1 and 2.
    Departs from the paper: heads that share keys search together, by their largest score; the
    last query of a block speaks too.

    Examples
    --------
    >>> HiP(budget_tokens=256).block_size
    32
    """

    card: ClassVar = Card(
        title="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
        system="hip",
        year=2024,
        arxiv="2406.09827",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores",
        score="largest score of a stretch's middle key with the queries of a block",
        pattern="key blocks per query block, beside a window and the first keys",
        budget="number of keys",
        schedule="every prefill call; every few tokens in decoding",
        kernel="block-sparse attention",
        departs="heads that share keys search together, by their largest score; the last query of "
        "a block speaks too",
    )
    full: ClassVar = {"budget_tokens": 1 << 20}
    example: ClassVar = {
        "budget_tokens": 8,
        "block_size": 4,
        "key_block": 1,
        "query_stride": 1,
        "local": 4,
        "sink": 1,
        "refresh": 2,
        "dense_layers": 0,
    }
    peeks: ClassVar = "the queries of a block search together, the later ones too"
    exempt: ClassVar = {
        "dense at sparsity 0": "it has no sparsity: its budget is a number of keys",
        "encoders": "the search covers the keys before a query",
    }

    budget_tokens: int = 512
    block_size: int = 32
    key_block: int = 2
    query_stride: int = 2
    local: int = 128
    sink: int = 16
    refresh: int = 8
    dense_layers: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("budget_tokens", "block_size", "key_block", "query_stride", "local"):
            check_count(name, getattr(self, name), 1)
        check_count("sink", self.sink, 0)
        check_count("refresh", self.refresh, 1)

    def plan(self, model: nn.Module, data: Any, length: int) -> TreeSelector:
        return TreeSelector(
            self.budget_tokens,
            self.block_size,
            self.key_block,
            self.query_stride,
            self.local,
            self.sink,
            self.refresh,
        )

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TreeSelector:
        return TreeSelector(**{field.name: meta[field.name] for field in fields(TreeSelector)})
