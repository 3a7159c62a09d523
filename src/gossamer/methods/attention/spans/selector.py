"""The selector of spans: sinks and the latest keys, as many as head and length of the text say.

Shapes: B = batch (1 where all rows agree), G = key-value heads, q = queries, K = keys.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.attention.eviction.positional import TAIL, PositionSelector
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import pairs_in_window
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.spans.index import SpanIndex, logical_lengths
from gossamer.methods.attention.spans.plan import Spans
from gossamer.models import State

__all__ = ["SpanSelector", "span_pairs"]


@dataclass(frozen=True)
class SpanSelector(PositionSelector):
    """Sinks and a span per layer and key-value head, by the length of each text."""

    spans: Spans
    sink: int
    facts: tuple[str, ...] = ()
    evict: bool = False

    def index(self, call: Call, layout: Layout, layer: int) -> SpanIndex:
        spans, heads = self.spans, call.groups[0]
        if layer >= spans.layers or spans.heads(layer) != heads:
            planned = spans.heads(layer) if layer < spans.layers else "no"
            raise GossamerError(
                f"the spans give layer {layer} {planned} key-value heads, the model has {heads}; "
                "they are of another model: plan them on this one"
            )
        recent = tuple(spans.at(layer, length) for length in logical_lengths(layout))
        name = ("spans", self.sink, recent)
        if name not in layout.memo:
            layout.memo[name] = SpanIndex(layout, self.sink, recent)
        return layout.memo[name]

    def reads(self, layer: int, at: Tensor, of: Tensor, lengths: tuple[int, ...]) -> Tensor:
        recent = [self.spans.at(layer, length) for length in lengths]
        near = at - of < torch.tensor(recent, device=of.device)[:, :, None, None]
        return near | (of < self.sink)

    def needed(self, layer: int, of: Tensor, lengths: tuple[int, ...]) -> Tensor:
        oldest = [self.spans.reach(layer, length) for length in lengths]
        near = of >= torch.tensor(oldest, device=of.device)[:, :, None] - TAIL
        return near | (of < self.sink)

    def pairs(self, length: int, layer: int, own: int | None) -> tuple[int, int]:
        spans = self.spans.at(layer, length)
        found = [span_pairs(length, self.sink, span, own) for span in spans]
        return round(sum(kept for kept, _ in found) / len(found)), found[0][1]

    def simulated(self, backend: str, length: int) -> bool:
        return backend in ("masked", "reference")

    def state(self) -> State:
        spans = self.spans
        return State(
            {
                "alphas": [list(row) for row in spans.alphas],
                "betas": [list(row) for row in spans.betas],
                "block_size": spans.block,
                "sink": self.sink,
                "facts": list(self.facts),
            }
        )

    def notes(self) -> tuple[str, ...]:
        return self.facts


@cache
def span_pairs(length: int, sink: int, span: int, own: int | None) -> tuple[int, int]:
    return pairs_in_window(length, sink, span, own)
