"""Token Sparse Attention: in calm layers, some tokens of a prompt sit attention out.

A token that the prompt's last queries hardly read neither asks nor is read in such a layer; the
residual stream carries it on, and the next layer chooses anew. Nothing is evicted for good.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.core.scores.attention_estimate import last_query_weights
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.estimate.tail import Tail, tails
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.ranked import first_ranks
from gossamer.methods.attention.selector import Selector
from gossamer.methods.attention.subset import SubsetIndex
from gossamer.methods.attention.token_choice.coverage import spared, token_scores
from gossamer.methods.attention.token_choice.drift import calm_layers, profile_drift
from gossamer.models import State, Tokens, as_tokens, find_sites

__all__ = ["TokenSparse"]


@dataclass(frozen=True)
class TokenSelector(Selector):
    """The tokens that take part, per key-value head; everything in the other layers."""

    layers: tuple[int, ...]
    coverage: float
    window: int
    min_tokens: int
    kernel: int
    facts: tuple[str, ...] = ()

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        short = layout.end - layout.key_offset <= self.min_tokens + self.window
        if layer not in self.layers or short or self.coverage == 0:
            return FullIndex(layout)
        batch, shared = call.query.shape[0], call.groups[0]
        chosen = torch.zeros(batch, shared, layout.keys, dtype=torch.bool, device=call.query.device)
        for tail in tails(call, layout, self.window):
            kept = self.choose(call, layout, tail)
            chosen[tail.rows, :, : kept.shape[2]] = kept
        first = layout.query_offset - layout.key_offset
        asked = chosen[:, :, first : first + layout.queries]
        return SubsetIndex(layout, asked, chosen)

    def choose(self, call: Call, layout: Layout, tail: Tail) -> Tensor:
        """Tokens of some rows that take part, bool (b, G, k), up to the rows' last query."""
        weights = last_query_weights(tail.query, tail.key, call.factor, tail.seen, call.softcap)
        keys = tail.key.shape[2]
        place = torch.arange(keys, device=weights.device)
        real = _real(layout, tail, keys)
        recent = place >= keys - self.window
        early = real & ~recent
        score = token_scores(weights.mean(2), self.kernel, early)
        total = early.sum(-1)
        keep = (total - spared(score, early, self.coverage) - 1).clamp_min(self.min_tokens)
        ranked = score.masked_fill(~early[:, None], -1.0)
        count = keep[:, None, None].expand(*ranked.shape[:2], 1)
        kept = first_ranks(ranked, count) & early[:, None]
        return kept | (real & recent)[:, None]

    def state(self) -> State:
        return State(
            {
                "layers": list(self.layers),
                "coverage": self.coverage,
                "window": self.window,
                "min_tokens": self.min_tokens,
                "kernel": self.kernel,
                "facts": list(self.facts),
            }
        )

    def notes(self) -> tuple[str, ...]:
        return (f"tokens may rest in layers {', '.join(map(str, self.layers))}", *self.facts)


def _real(layout: Layout, tail: Tail, keys: int) -> Tensor:
    """(b, k): tokens of a tail's rows that are no padding."""
    if layout.padding is None:
        return torch.ones(1, keys, dtype=torch.bool, device=layout.device)
    start = layout.key_offset
    return layout.padding[tail.rows, start : start + keys]


@dataclass(frozen=True, kw_only=True)
class TokenSparse(AttentionMethod):
    """Let unattended tokens of a prompt skip the attention of calm layers.

    Parameters
    ----------
    coverage : share of the last queries' attention, in [0, 1), that the resting tokens may have
        had together; 0 lets none rest.
    window : last tokens, which always take part and whose attention decides.
    min_tokens : earlier tokens that take part at least; shorter prompts stay full.
    kernel : odd, tokens over which attention is smoothed.
    quantile : layers up to this quantile of relative drift may rest tokens; measured on the first
        window of the data. Without data the second half of the layers.
    layers : these layers instead.
    """

    card: ClassVar = Card(
        title="Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token "
        "Selection",
        year=2026,
        arxiv="2602.03216",
        system="token_sparse",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="tokens of a prompt in attention",
        score="attention of the last queries, smoothed over neighbours",
        pattern="tokens per key-value head, as queries and as keys",
        budget="share of the last queries' attention that may be lost",
        schedule="every prompt, each calm layer anew",
        kernel="token gather, fused causal attention, scatter",
        departs="heads that share keys share tokens, by their mean attention; padding neither "
        "counts nor takes part",
    )
    phases: ClassVar = frozenset({"prefill"})
    example: ClassVar = {"coverage": 0.2, "window": 4, "min_tokens": 6, "kernel": 3}
    full: ClassVar = {"coverage": 0.0}
    chunked: ClassVar = "every chunk chooses by its own last queries and rests its own only"
    peeks: ClassVar = "the last queries of a prompt decide which of its tokens take part"
    exempt: ClassVar = {
        "dense at sparsity 0": "the budget is a share of the attention",
        "exact sparsity": "the budget is a share of the attention",
        "encoders": "the family works on causal decoders",
        "beats window": "tokens that rest read nothing, which counts as mass lost",
    }

    coverage: float = 0.005
    window: int = 128
    min_tokens: int = 1024
    kernel: int = 7
    quantile: float = 0.5
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "min_tokens", "kernel"):
            check_count(name, getattr(self, name), 1)
        if self.kernel % 2 == 0:
            raise GossamerError(f"kernel is {self.kernel}; give an odd number of tokens")
        if not 0.0 <= self.coverage < 1.0:
            raise GossamerError(f"coverage is {self.coverage}; give a share of at least 0, below 1")
        if not 0.0 <= self.quantile <= 1.0:
            raise GossamerError(f"quantile is {self.quantile}; give a share, 0 to 1")

    def plan(self, model: nn.Module, data: Any, length: int) -> TokenSelector:
        count = len(find_sites(model).blocks)
        if self.layers is not None:
            beyond = [layer for layer in self.layers if not 0 <= layer < count]
            if beyond:
                raise GossamerError(
                    f"layer {beyond[0]} does not exist; the model has layers 0 to {count - 1}"
                )
            return self._selector(tuple(self.layers), ())
        if data is None:
            fact = "without data to measure drift on, the second half of the layers"
            return self._selector(tuple(range(count // 2, count)), (fact,))
        tokens = as_tokens(data, model)
        first = Tokens(tokens.input_ids[:1], tokens.attention_mask[:1])
        drift = profile_drift(model, first)
        fact = "relative drift by layer: " + ", ".join(f"{d:.2f}" for d in drift)
        return self._selector(calm_layers(drift, self.quantile), (fact,))

    def _selector(self, layers: tuple[int, ...], facts: tuple[str, ...]) -> TokenSelector:
        return TokenSelector(
            layers, self.coverage, self.window, self.min_tokens, self.kernel, facts
        )

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TokenSelector:
        return self._selector(tuple(meta["layers"]), tuple(meta["facts"]))
