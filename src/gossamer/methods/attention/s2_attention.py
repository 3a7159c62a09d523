"""S2-Attention: every head reads its own share of the far context, all heads together read it all.

Blocks near the query are read by every head; of the blocks before, head h reads each stride-th,
at an offset of its own. The pattern is fixed before training, so a kernel knows it in advance
and a cache need only keep each head's share; a model must be trained under it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.methods.attention.eviction.positional import TAIL, PositionSelector
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import EXECUTORS, choose
from gossamer.methods.attention.index import BlockIndex, FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.trained.method import TrainedMethod
from gossamer.models import State

__all__ = ["S2Attention", "ShardSelector", "coverage", "sharded_blocks"]

Offsets = Literal["heterogeneous", "homogeneous", "local"]

_ROWS = 256
"""Queries whose pairs are counted at once where the model has a window of its own."""


def sharded_blocks(
    query: Tensor,
    key: Tensor,
    *,
    heads: int,
    local: int,
    stride: int,
    offsets: Offsets = "heterogeneous",
) -> Tensor:
    """Which key blocks each head reads.

    Block j <= i is read by head h if i - j < local or (j + h d + 1) mod stride = 0, where
    d = max(1, floor(stride / heads)); d = 0 where all heads share one offset.

    Parameters
    ----------
    query : int (..., q), numbers of query blocks. key : int (..., k), numbers of key blocks.
    heads : key-value heads. local, stride : in blocks, >= 1.
    offsets : ``homogeneous`` gives every head the first one's, ``local`` leaves the far blocks out.

    Returns
    -------
    bool, (..., heads, q, k).

    >>> block = torch.arange(4)
    >>> sharded_blocks(block, block, heads=2, local=1, stride=2)[:, 3].int().tolist()
    [[0, 1, 0, 1], [1, 0, 1, 1]]
    """
    i, j = query[..., None, :, None], key[..., None, None, :]
    near = i - j < local
    return (j <= i) & (near | _far(j, heads, stride, offsets))


def _far(block: Tensor, heads: int, stride: int, offsets: Offsets) -> Tensor:
    """Which blocks (..., G or 1, q, k) a head reads from afar, all (..., G, q, k) of them."""
    if offsets == "local":
        return torch.zeros_like(block, dtype=torch.bool)
    step = max(1, stride // heads) if offsets == "heterogeneous" else 0
    head = torch.arange(heads, device=block.device)[:, None, None]
    return (block + head * step + 1) % stride == 0


def coverage(heads: int, stride: int, offsets: Offsets = "heterogeneous") -> float:
    """Share of the far blocks that at least one head reads."""
    if offsets == "local":
        return 0.0
    step = max(1, stride // heads) if offsets == "heterogeneous" else 0
    return len({(head * step) % stride for head in range(heads)}) / stride


@dataclass(frozen=True)
class ShardSelector(PositionSelector):
    """The blocks of every key-value head, by position alone.

    Blocks count the real tokens of a sequence, so padding moves none.
    """

    heads: int
    block: int
    local: int
    stride: int
    offsets: Offsets
    dense_every: int
    evict: bool = False

    def is_dense(self, layer: int) -> bool:
        """Whether a layer, counted from 0, keeps full attention."""
        return bool(self.dense_every) and (layer + 1) % self.dense_every == 0

    def index(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        if self.is_dense(layer):
            return FullIndex(layout)
        if not layout.plain or layout.queries == 1 or layout.end != layout.keys:
            return self.blocks(layout)
        return _plain_index(self, layout.batch, layout.queries, layout.keys, layout.device)

    def frees(self, layer: int) -> bool:
        return not self.is_dense(layer)

    def reads(self, layer: int, at: Tensor, of: Tensor, lengths: tuple[int, ...]) -> Tensor:
        i, j = (x.div(self.block, rounding_mode="floor") for x in (at, of))
        return (i - j < self.local) | _far(j, self.heads, self.stride, self.offsets)

    def needed(self, layer: int, of: Tensor, lengths: tuple[int, ...]) -> Tensor:
        last = torch.tensor(lengths, device=of.device)[:, None, None, None] - TAIL
        return self.reads(layer, last, of[:, :, None], lengths)[:, :, 0]

    def blocks(self, layout: Layout) -> BlockIndex:
        """The blocks of one call.

        Where a sequence or a chunk begins inside a block, finer blocks spell out the same pairs.
        """
        if self not in layout.memo:
            high, wide = self._units(layout)
            query = layout.position[:, layout.query_index[::high]]
            key = layout.position[:, layout.key_index[::wide]]
            kept = sharded_blocks(
                query.div(self.block, rounding_mode="floor"),
                key.div(self.block, rounding_mode="floor"),
                heads=self.heads,
                local=self.local,
                stride=self.stride,
                offsets=self.offsets,
            )
            real = (query >= 0)[:, None, :, None] & (key >= 0)[:, None, None, :]
            layout.memo[self] = BlockIndex.from_blocks(layout, kept & real, (high, wide))
        return layout.memo[self]

    def _units(self, layout: Layout) -> tuple[int, int]:
        """Queries and keys that lie in one block of every row."""
        if not (layout.regular and layout.gapless):
            return 1, 1
        starts = gcd(self.block, *layout.first.tolist())
        high = starts if layout.queries == 1 else gcd(starts, layout.query_offset)
        return high, gcd(starts, layout.key_offset)

    def pairs(self, length: int, layer: int, own: int | None) -> tuple[int, int]:
        """Of the mean key-value head, rounded to a whole pair."""
        kept, total = _mean_pairs(self, length, own)
        return (total if self.is_dense(layer) else kept), total

    def simulated(self, backend: str, length: int) -> bool:
        return EXECUTORS[choose(self.blocks(Layout(1, length, length)), backend)].simulated

    def state(self) -> State:
        return State({"heads": self.heads})

    def notes(self) -> tuple[str, ...]:
        near = f"every head reads the latest {self.local} blocks of {self.block}"
        if self.offsets == "local":
            return (f"{near} tokens and nothing before",)
        far = f"and each {self.stride}-th before, at an offset of its own"
        if self.offsets == "homogeneous":
            far = f"and each {self.stride}-th before, all heads the same"
        share = coverage(self.heads, self.stride, self.offsets)
        together = f"together the {self.heads} key-value heads read {share:.0%} of the far blocks"
        return f"{near} {far}", together


@lru_cache(maxsize=2)
def _plain_index(
    selector: ShardSelector, batch: int, queries: int, keys: int, device: torch.device
) -> BlockIndex:
    """The index of unpadded calls of one size, made once: what executors prepare for it stays."""
    layout = Layout(batch, queries, keys, query_offset=keys - queries, device=device)
    return selector.blocks(layout)


@lru_cache(maxsize=8)
def _mean_pairs(selector: ShardSelector, length: int, own: int | None) -> tuple[int, int]:
    """Pairs kept by the mean key-value head, and pairs a head reads in all."""
    index = selector.blocks(Layout(1, length, length))
    kept, total = index.pairs() if own is None or own >= length else _pairs_within(index, own)
    return round(kept / selector.heads), total // selector.heads


def _pairs_within(index: BlockIndex, own: int) -> tuple[int, int]:
    """Pairs kept, and pairs of all heads, where queries see only the latest ``own`` keys."""
    layout = index.layout
    kept = total = 0
    for start in range(0, layout.queries, _ROWS):
        rows = slice(start, min(start + _ROWS, layout.queries))
        query, key = layout.query_index[rows][:, None], layout.key_index
        band = (key <= query) & (query - key < own)
        mask = index.mask(rows)
        kept += int((mask & band).sum())
        total += int(band.sum()) * mask.shape[1]
    return kept, total


@dataclass(frozen=True, kw_only=True)
class S2Attention(TrainedMethod):
    """Train a model under a static pattern in which every head reads another share of the past.

    Parameters
    ----------
    block : tokens of a block. local : latest blocks every head reads, its own included.
    stride : of the far blocks, each head reads each stride-th; the heads together read all of
        them if there are as many key-value heads as the stride.
    offsets : ``heterogeneous``; ``homogeneous`` and ``local`` (no far blocks) are its controls.
    dense_every : each so-many-th layer keeps full attention; 0 for none.
    steps, lr, batch_size, seed : of the training of all weights under the pattern, the rate
        falling to 0 over the second half; 0 steps only puts the pattern in place.
    dense_layers : first layers that keep full attention.
    evict : dynamic caches keep of every head only its share and the local blocks, once decoding
        has begun; answers stay the same. False keeps every key. After ``restore()`` a cache that
        gave up keys cannot be used any more and says so.

    Source: arXiv 2407.17678, §3; block, local, stride and dense layers of Phi-3-small.

    Departs from the paper: the offset step of max(1, floor(stride / heads)) is from memory of
    the serving code.
    """

    card: ClassVar = Card(
        title="Efficient LLM Training and Serving with Heterogeneous Context Sharding among "
        "Attention Heads",
        year=2024,
        arxiv="2407.17678",
        system="s2_attention",
        family="attention",
        when="during training",
        start="dense",
        site="attention scores",
        score="position and head",
        pattern="local blocks, and each stride-th block at an offset of the key-value head",
        budget="local blocks and a stride",
        schedule="every call",
        update="training of all weights under the pattern; keys no later token reads are freed",
        kernel="static block-sparse: gathered blocks, fused attention",
        departs="offset step for fewer heads than the stride from memory",
    )
    example: ClassVar[Mapping[str, Any]] = {
        "block": 4,
        "local": 1,
        "stride": 2,
        "dense_every": 0,
        "steps": 2,
        "batch_size": 3,
    }
    full: ClassVar[Mapping[str, Any]] = {"local": 1 << 20, "steps": 0}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "the amount is a number of blocks and a stride; local 2^20 is dense",
        "encoders": "a causal pattern belongs to decoders",
    }

    block: int = 64
    local: int = 16
    stride: int = 8
    offsets: Offsets = "heterogeneous"
    dense_every: int = 2
    evict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("block", 1), ("local", 1), ("stride", 1), ("dense_every", 0)):
            check_count(name, getattr(self, name), least)
        if self.dense_every == 1:
            raise GossamerError("dense_every is 1, which keeps every layer dense; give 0 or 2 up")
        if self.offsets not in get_args(Offsets):
            raise GossamerError(
                f"offsets is {self.offsets!r}; choose from {', '.join(get_args(Offsets))}"
            )

    def plan(self, model: nn.Module, data: Any, length: int) -> ShardSelector:
        return self._selector(_key_value_heads(model))

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ShardSelector:
        return self._selector(int(meta["heads"]))

    def _selector(self, heads: int) -> ShardSelector:
        return ShardSelector(
            *(heads, self.block, self.local, self.stride, self.offsets),
            dense_every=self.dense_every,
            evict=self.evict,
        )


def _key_value_heads(model: nn.Module) -> int:
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "num_key_value_heads", None)
    return int(config.num_attention_heads if found is None else found)
