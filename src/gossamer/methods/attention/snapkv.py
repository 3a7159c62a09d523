"""SnapKV: what the end of a prompt reads is what the answer will read; drop the other keys.

The last queries of a prompt vote with their attention. Each head keeps the keys they read most,
with their neighbours, and the observation window itself; the cache lets go of the rest.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count, unknown
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.decoding.choose import Amount
from gossamer.methods.attention.eviction.observe import (
    keep_equal,
    keep_over_heads,
    observed_mass,
    remember_queries,
    windowed,
)
from gossamer.methods.attention.eviction.packed import PackedIndex
from gossamer.methods.attention.eviction.shortened import Shortened, shorten, why_not
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import BlockIndex, FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.models import State

__all__ = ["SnapKV"]

Allocation = Literal["equal", "heads"]
Pooling = Literal["mean", "max"]


@dataclass(frozen=True)
class VoteSelector(Selector):
    """Remembers a prompt's last queries; at the first token after it, drops what they ignored."""

    sparsity: float | None
    budget_tokens: int | None
    window: int
    pool: int
    pooling: Pooling
    allocation: Allocation
    floor: float

    stateful: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    evicts: ClassVar[bool] = True

    def observe(self, call: Call, layout: Layout, layer: int) -> None:
        if layout.phase == "prefill" and "kept" not in call.state.tensors:
            remember_queries(call, layout, self.window)

    def owns(self, call: Call, layer: int) -> bool:
        return isinstance(_layer_of(call, layer), Shortened)

    def weighable(self, call: Call, layout: Layout, layer: int) -> bool:
        return False

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        held = _layer_of(call, layer)
        if isinstance(held, Shortened):
            return PackedIndex.over(layout, held.counts, held.keys.shape[2], held.size)
        if not layout.query_offset or windowed(held, layout):
            return FullIndex(layout)
        if "kept" not in call.state.tensors:
            call.state.tensors["kept"] = self._choose(call, layout)
        kept = call.state.tensors["kept"]
        later = torch.ones(1, dtype=torch.bool, device=kept.device)
        later = later.expand(*kept.shape[:2], layout.keys - kept.shape[2])
        return BlockIndex.from_blocks(
            layout, torch.cat([kept, later], dim=2)[:, :, None], (layout.queries, 1)
        )

    def after(self, call: Call, layout: Layout, layer: int) -> None:
        held, kept = _layer_of(call, layer), call.state.tensors.get("kept")
        if held is not None and kept is not None and why_not(held) is None:
            call.state.clear()
            shorten(held, kept)

    def _choose(self, call: Call, layout: Layout) -> Tensor:
        """(B, G, P) keys of the prompt that stay."""
        query, end = call.state.tensors.get("queries"), layout.query_offset
        if query is None or call.state.facts.get("end") != end:
            # The prompt was read before the method was at work: the new queries must do.
            query, end = call.query, layout.end
        query = query[:, :, -min(query.shape[2], end) :]
        mass = observed_mass(call, layout, query, end, self.pool, self.pooling)
        mass = mass[..., : layout.query_offset]
        at = torch.arange(mass.shape[2], device=mass.device)
        real = torch.ones_like(at, dtype=torch.bool)[None]
        if layout.padding is not None:
            real = layout.padding[:, : len(at)]
        # The latest real keys, wherever padding stands.
        rank = real.flip(1).cumsum(1).flip(1)
        recent = real & (rank <= self.window)
        budget = Amount(self.sparsity, self.budget_tokens, self.window).of(real.sum(1))
        count = (budget - recent.sum(1)).clamp_min(0)
        candidates = (real & ~recent)[:, None]
        if self.allocation == "heads":
            kept = keep_over_heads(mass, candidates, count, self.floor)
        else:
            kept = keep_equal(mass, candidates, count)
        return kept | recent[:, None]

    def state(self) -> State:
        return State(asdict(self))

    def notes(self) -> tuple[str, ...]:
        split = "shared out over the heads" if self.allocation == "heads" else "the same per head"
        return (
            f"keys of the prompt are dropped for good at the first token after it, {split}; "
            "dynamic caches shrink, others (static, quantized) keep the keys unread",
        )


def _layer_of(call: Call, layer: int) -> Any:
    layers = getattr(call.cache, "layers", ())
    return layers[layer] if layer < len(layers) else None


@dataclass(frozen=True, kw_only=True)
class SnapKV(AttentionMethod):
    """After a prompt, keep only the keys its last queries read; the cache really shrinks.

    Parameters
    ----------
    sparsity : share of the prompt's keys that go, in [0, 1); 0.5 when no budget is given.
    budget_tokens : keys of the prompt kept per head instead, the window among them.
    window : last queries that vote; their own keys stay. 64, or 32, in the reference code.
    pool : odd number of neighbouring keys that are judged together; 1 for none.
    pooling : ``mean`` or ``max`` over them.
    allocation : ``equal`` keeps as many keys in every head; ``heads`` keeps the best of a layer's
        heads taken together (Ada-SnapKV), so heads hold different numbers of keys.
    floor : with ``heads``, share of the equal part that no head falls below, 0 to 1.
    dense_layers : first layers that keep everything.

    Notes
    -----
    Eviction happens when the first token after the prompt arrives, so a prompt may be given in
    chunks; until then every key is held. A later question over the same cache is answered from
    what the first one left: keys that it would have needed may be gone. Positions go on from the
    true length. Layers with a sliding window of their own are left as they are.

    Assisted decoding reads the prompt together with its first candidates and takes back those it
    rejects; what the prompt's queries read is then forgotten and the next queries vote instead, as
    they do for a cache that was filled before the method was at work.

    Heads of different lengths are stored back to back, without padding; for attention they are
    laid side by side one layer at a time.

    ``backend="fastest"`` is ``auto`` here: full attention lacks the evicted keys, and where it ran
    instead no memory would be saved.

    After ``restore()`` a shortened cache cannot be used any more and says so.

    Departs from the paper: heads that share keys vote together, by the mean of their attention
    probabilities.
    """

    card: ClassVar = Card(
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        year=2024,
        arxiv="2404.14469",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="keys and values in the cache",
        score="attention of the prompt's last queries, pooled over neighbours",
        pattern="keys per key-value head",
        budget="number of keys, or sparsity over the prompt's; equal per head or over all heads",
        schedule="once, after the prompt",
        update="evicted keys and values are freed",
        kernel="fused attention over the shortened cache",
        departs="heads of a group vote together; eviction at the first token after the prompt",
    )
    phases: ClassVar = frozenset({"decode"})
    subject: ClassVar = "decoding language model"
    full: ClassVar = {"sparsity": 0.0}
    example: ClassVar = {"window": 2, "pool": 3}
    exempt: ClassVar = {
        "exact sparsity": "it counts keys of the prompt; tokens after it keep all of theirs",
        "encoders": "the family works on causal decoders",
    }

    sparsity: float | None = None
    budget_tokens: int | None = None
    window: int = 64
    pool: int = 5
    pooling: Pooling = "mean"
    allocation: Allocation = "equal"
    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        Amount.check(self)
        check_count("window", self.window, 1)
        check_count("pool", self.pool, 1)
        if not self.pool % 2:
            raise GossamerError(f"pool is {self.pool}; give an odd number, so that it has a middle")
        if self.pooling not in get_args(Pooling):
            raise unknown("pooling", self.pooling, get_args(Pooling))
        if self.allocation not in get_args(Allocation):
            raise unknown("allocation", self.allocation, get_args(Allocation))
        if not 0.0 <= self.floor <= 1.0:
            raise GossamerError(f"floor is {self.floor!r}; give a share from 0 to 1")

    def plan(self, model: nn.Module, data: Any, length: int) -> VoteSelector:
        return self._selector()

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VoteSelector:
        return self._selector()

    def _selector(self) -> VoteSelector:
        return VoteSelector(
            self.sparsity,
            self.budget_tokens,
            self.window,
            self.pool,
            self.pooling,
            self.allocation,
            self.floor,
        )
