"""HISA: a small trained indexer picks each query's keys, looking at blocks before it looks at keys.

The indexer of DeepSeek sparse attention scores every key with a few small heads; the best keys are
read by all heads. That scoring still grows with the square of the text. HISA scores the mean key
of every block first, and single keys only in the best blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import BlockIndex, FullIndex, KeyIndex
from gossamer.methods.attention.indexer.module import Indexer
from gossamer.methods.attention.indexer.native import NativeSearch, is_native
from gossamer.methods.attention.indexer.search import (
    Found,
    Keys,
    flat_search,
    hierarchical_search,
)
from gossamer.methods.attention.indexer.training import train_indexers
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.models import Progress, State, as_tokens
from gossamer.models.fit import FitPlan

__all__ = ["HISA"]

_HELD = 1 << 24
"""Scores, or channels of gathered keys, held at once."""


@dataclass(frozen=True)
class IndexerSelector(Selector):
    """The best keys of every query by its layer's indexer, one choice for all heads."""

    stateful = True
    observes = True

    indexers: Mapping[int, Indexer] = field(compare=False)
    budget: int
    block: int
    blocks: int
    facts: tuple[str, ...] = ()

    def observe(self, call: Call, layout: Layout, layer: int) -> None:
        if layer in self.indexers:
            self._keys(call, layout, self.indexers[layer])

    @torch.no_grad()
    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        if layer not in self.indexers:
            raise GossamerError(
                f"no indexer was trained for layer {layer}; apply the method anew with fewer "
                "dense_layers"
            )
        indexer = self.indexers[layer]
        keys = self._keys(call, layout, indexer)
        # The hidden states of keys that came before the method was applied are gone.
        if keys is None or layout.end <= self.budget:
            return FullIndex(layout)
        assert call.hidden is not None
        query, weight = indexer.queries(call.hidden, _positions(layout))
        return self.search(query, weight, keys, layout)

    def _keys(self, call: Call, layout: Layout, indexer: Indexer) -> Tensor | None:
        """Indexer keys of all tokens up to the last query, (B, N, D); kept with the cache."""
        held = call.state.keyed.get("indexer")
        known = 0 if held is None else held.shape[1]
        if known < layout.query_offset or call.hidden is None:
            return None
        # A plan that was loaded does not know where the model runs.
        indexer.to(call.hidden.device)
        with torch.no_grad():
            new = indexer.keys(call.hidden, _positions(layout))
        whole = new if held is None else torch.cat([held[:, : layout.query_offset], new], dim=1)
        call.state.keyed["indexer"] = whole
        return whole

    def search(self, query: Tensor, weight: Tensor, key: Tensor, layout: Layout) -> BlockIndex:
        """The kept keys of a call, given its indexer queries, head weights and keys.

        Parameters
        ----------
        query : (B, Q, H, D). weight : (B, Q, H). key : (B, N, D), in absolute order.
        """
        order = _Order.of(layout)
        keys = order.arranged(key)
        flat = self.blocks == 0 or self.blocks * self.block >= layout.end
        means = None if flat else keys.means(self.block)
        width = query.shape[2] * layout.end
        width = width if flat else self.blocks * self.block * key.shape[-1]
        step = max(1, _HELD // (len(query) * width))
        found: list[Found] = []
        for start in range(0, layout.queries, step):
            rows = slice(start, min(start + step, layout.queries))
            sees = order.viewer(rows)
            part = query[:, rows], weight[:, rows], keys
            if means is None:
                one = flat_search(*part, sees, self.budget)
            else:
                one = hierarchical_search(
                    *part,
                    means,
                    order.at(rows),
                    sees,
                    self.budget,
                    block=self.block,
                    blocks=self.blocks,
                )
            found.append(one)
        return _token_lists(layout, order, found)

    def state(self) -> State:
        tensors = {
            f"{layer}.{name}": tensor.detach().clone()
            for layer, indexer in self.indexers.items()
            for name, tensor in indexer.state_dict().items()
        }
        one = next(iter(self.indexers.values()))
        meta = {
            "layers": sorted(self.indexers),
            "model_width": one.query.in_features,
            "heads": one.heads,
            "width": one.width,
            "budget": self.budget,
            "block": self.block,
            "blocks": self.blocks,
            "facts": list(self.facts),
        }
        return State(meta, tensors)

    def notes(self) -> tuple[str, ...]:
        scored = (
            "every key"
            if self.blocks == 0
            else (
                f"the means of blocks of {self.block} keys, then the keys of the best {self.blocks}"
            )
        )
        return (f"the indexer scores {scored}; {self.budget} keys a query", *self.facts)


def _positions(layout: Layout) -> Tensor:
    """(B or 1, Q) logical positions of the queries."""
    return layout.position[:, layout.query_index].clamp_min(0)


@dataclass(frozen=True, eq=False)
class _Order:
    """Logical order of the tokens of a call: where each row's real tokens begin.

    Parameters
    ----------
    first : int64, (B or 1, 1), absolute index of logical place 0. Where padding has gaps or
        sequences are packed, the absolute order stands in and ``first`` is 0.
    """

    layout: Layout
    first: Tensor

    @classmethod
    def of(cls, layout: Layout) -> "_Order":
        name = ("indexer order",)
        if name not in layout.memo:
            first = layout.first if layout.gapless else layout.first.new_zeros(1)
            layout.memo[name] = cls(layout, first[:, None])
        return layout.memo[name]

    def arranged(self, key: Tensor) -> Keys:
        """Keys (B, N, D) in logical order, with what is no token marked."""
        layout = self.layout
        if layout.padding is None:
            return Keys(key)
        place = torch.arange(layout.end, device=key.device) + self.first
        inside = place < layout.end
        place = place.clamp_max(layout.end - 1)
        real = inside & layout.padding.gather(1, place.expand(len(layout.padding), -1))
        place = place[..., None].expand(len(key), -1, key.shape[-1])
        return Keys(key.gather(1, place), real)

    def at(self, rows: slice) -> Tensor:
        """(B or 1, q) places of queries; of padding, any."""
        return (self.layout.query_index[rows] - self.first).clamp_min(0)

    def absolute(self, place: Tensor) -> Tensor:
        """Absolute indices of logical places (B, q, M)."""
        return (place + self.first[..., None]).clamp_max(self.layout.end - 1)

    def viewer(self, rows: slice) -> Any:
        """Which logical places (B, q, M) the queries of some rows see."""
        layout = self.layout
        query = layout.query_index[rows].view(1, 1, -1, 1)

        def sees(place: Tensor) -> Tensor:
            there = (place + self.first[..., None]) < layout.end
            key = self.absolute(place)
            seen = layout.sees(query, key[:, None])[:, 0]
            return seen & there & (key >= layout.key_offset)

        return sees


def _token_lists(layout: Layout, order: _Order, found: list[Found]) -> BlockIndex:
    """Chosen keys as lists of single keys, (1, 1) blocks."""
    counts = torch.cat([one.kept.sum(-1) for one in found], dim=1)[:, None]
    rows = [
        torch.cat([(order.absolute(one.place)[b])[one.kept[b]] for one in found])
        for b in range(len(counts))
    ]
    ends = counts.flatten().cumsum(0).view(counts.shape)
    indptr = torch.cat([ends[..., :1] - counts[..., :1], ends], dim=-1)
    return BlockIndex(layout, (1, 1), indptr, torch.cat(rows) - layout.key_offset)


@dataclass(frozen=True, kw_only=True)
class HISA(AttentionMethod):
    """Read the keys a trained indexer ranks first, found block by block.

    Parameters
    ----------
    budget_tokens : keys of a query, the same for all heads.
    block_size : keys whose indexer keys are averaged.
    blocks : blocks of a query whose keys are scored one by one; None takes 4 * budget_tokens keys'
        worth. 0 scores every key, which is DeepSeek sparse attention (DSA) itself.
    heads, width : of the indexer. steps, lr, batch_size : of its training on the data of
        :meth:`apply`, windows of tokens. seed : of its first weights and of the training's order.

    On a model that brings its own indexer (DeepSeek-V3.2, GLM-5) nothing is trained: its top-k
    search is exchanged for the hierarchical one, and its number of keys stays.
    """

    card: ClassVar = Card(
        title="HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse Attention",
        year=2026,
        arxiv="2603.28458",
        system="hisa",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores",
        score="learned indexer: block means first, then single keys",
        pattern="single keys, one list per query for all heads",
        budget="a number of keys per query",
        schedule="every call",
        update="the indexer alone is trained, by KL to the summed attention",
        kernel="gather while decoding; a prompt runs under a mask",
        departs="on models without an indexer one is trained: its queries come from the attention "
        "module's input (no low-rank latent) and each update learns from 64 queries of a sequence; "
        "first and own block are forced; a block counts once all its keys are past; no FP8",
    )
    example: ClassVar = {
        "budget_tokens": 6,
        "block_size": 2,
        "blocks": 4,
        "heads": 2,
        "width": 8,
        "steps": 4,
    }
    full: ClassVar = {"budget_tokens": 4096, "blocks": None}
    exempt: ClassVar = {
        "dense at sparsity 0": "the budget is a number of keys",
        "exact sparsity": "the budget is a number of keys",
        "beats window": "the example's indexer is barely trained; the claims train one",
        "encoders": "the family works on causal decoders",
    }

    budget_tokens: int = 2048
    block_size: int = 128
    blocks: int | None = None
    heads: int = 8
    width: int = 64
    steps: int = 300
    lr: float = 2e-3
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("budget_tokens", "block_size", "heads", "width"):
            check_count(name, getattr(self, name), 1)
        check_count("steps", self.steps, 0)
        if self.width % 4:
            raise GossamerError(f"width is {self.width}; give a multiple of 4")
        if self.blocks is not None:
            check_count("blocks", self.blocks, 0)
            if 0 < self.blocks * self.block_size < self.budget_tokens or self.blocks == 1:
                raise GossamerError(
                    f"{self.blocks} blocks of {self.block_size} hold too few keys to choose "
                    f"{self.budget_tokens} from; give at least "
                    f"{max(2, -(-self.budget_tokens // self.block_size))} blocks"
                )

    @property
    def searched(self) -> int:
        """Blocks of a query whose keys are scored; 0 for all."""
        if self.blocks is not None:
            return self.blocks
        return max(2, -(-4 * self.budget_tokens // self.block_size))

    def apply(self, model: nn.Module, data: Any = None, *, progress: Progress | None = None) -> Any:
        if is_native(model):
            return NativeSearch(self, model, self.block_size, self.searched, self.length)
        return super().apply(model, data, progress=progress)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> Any:
        if is_native(model):
            return NativeSearch(self, model, meta["block"], meta["blocks"], meta["length"])
        return super().reattach(model, meta, tensors)

    def plan(self, model: nn.Module, data: Any, length: int) -> IndexerSelector:
        return self.planned(model, data, length, None)

    def planned(
        self, model: nn.Module, data: Any, length: int, progress: Progress | None
    ) -> IndexerSelector:
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        layers = range(self.dense_layers, int(config.num_hidden_layers))
        if not layers:
            raise GossamerError(
                f"dense_layers is {self.dense_layers}, the model has {config.num_hidden_layers} "
                "layers: none is left to index"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            indexers = {
                layer: Indexer(int(config.hidden_size), self.heads, self.width) for layer in layers
            }
        device = next(model.parameters()).device
        for indexer in indexers.values():
            indexer.to(device)
        facts = ("the indexer is not trained: steps is 0",)
        if self.steps:
            tokens = as_tokens(data, model)
            losses = train_indexers(self, model, tokens, indexers, self._fit(tokens), progress)
            tenth = max(1, len(losses) // 10)
            first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
            facts = (
                f"indexers trained for {len(losses)} updates: KL to the attention {first:.2f} "
                f"nats at first, {last:.2f} at last",
            )
        return self._selector(indexers, facts)

    def _fit(self, tokens: Any) -> FitPlan:
        size = min(self.batch_size, len(tokens))
        return FitPlan(steps=self.steps, lr=self.lr, batch_size=size, decay=0.5, seed=self.seed)

    def _selector(self, indexers: Mapping[int, Indexer], facts: tuple[str, ...]) -> IndexerSelector:
        for indexer in indexers.values():
            indexer.requires_grad_(False)
        return IndexerSelector(indexers, self.budget_tokens, self.block_size, self.searched, facts)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IndexerSelector:
        indexers: dict[int, Indexer] = {}
        for layer in meta["layers"]:
            indexer = Indexer(int(meta["model_width"]), int(meta["heads"]), int(meta["width"]))
            start = f"{layer}."
            indexer.load_state_dict(
                {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            )
            indexers[int(layer)] = indexer
        return self._selector(indexers, tuple(meta["facts"]))
