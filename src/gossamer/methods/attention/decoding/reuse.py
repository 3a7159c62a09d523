"""Keys chosen in one layer, read by the layers after it.

A table names for every layer the layer whose choice it reads: its *anchor*. A layer that is its own
anchor attends to all keys and chooses.
Shapes: B = batch, G = key-value heads, Q = queries, K = keys, k = keys chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.core.scores.attention_estimate import last_query_weights
from gossamer.methods.attention.decoding.choose import Amount, best, index_of, visible
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.models import State

__all__ = ["ReuseSelector", "check_table", "chosen"]


def check_table(table: Sequence[int]) -> tuple[int, ...]:
    """The table, once every anchor is a layer at or before its reader that chooses itself."""
    for layer, anchor in enumerate(table):
        if not 0 <= anchor <= layer or table[anchor] != anchor:
            raise GossamerError(
                f"layer {layer} reads the keys chosen in layer {anchor}, which chooses none; an "
                "anchor is an earlier layer that is its own anchor"
            )
    return tuple(int(anchor) for anchor in table)


def chosen(call: Call, layout: Layout, amount: Amount, local: int = 1) -> Tensor:
    """Places (B, G, Q, k) of the keys with the largest true attention probability.

    Probabilities are averaged over the heads that share keys; -1 where a query has fewer.
    """
    weights = last_query_weights(
        call.grouped_query(), call.key, call.factor, layout.mask(), call.softcap
    )
    return best(weights, layout, amount, local)


class _Choice(NamedTuple):
    """Keys an anchor chose: absolute places (B, G, Q, k), and among which."""

    place: Tensor
    layout: Layout

    def serves(self, call: Call, layout: Layout) -> bool:
        """Whether a layer may read them: its heads are as many, and it sees no more keys.

        An anchor with a sliding window of its own cannot choose for a layer without.
        """
        own = (call.query.shape[0], call.groups[0], layout.queries)
        if self.place.shape[:3] != own:
            return False
        return layout is self.layout or bool((visible(layout) <= visible(self.layout)).all())


@dataclass(frozen=True)
class ReuseSelector(Selector):
    """Full attention in the anchors, their keys in all other layers.

    Parameters
    ----------
    table : the anchor of every layer.
    """

    table: tuple[int, ...]
    sparsity: float | None
    budget_tokens: int | None
    local: int = 1

    stateful: ClassVar[bool] = True

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        anchor, places = self.table[layer], call.step.setdefault("chosen", {})
        if anchor == layer:
            if layer in self.table[layer + 1 :]:
                amount = Amount(self.sparsity, self.budget_tokens)
                place = chosen(call, layout, amount, self.local)
                # Kept from the sequence's start: layers with a window of their own begin later.
                place = torch.where(place < 0, -1, place + layout.key_offset)
                places[layer] = _Choice(place, layout)
            return FullIndex(layout)
        choice = places.get(anchor)
        if choice is None or not choice.serves(call, layout):
            return FullIndex(layout)
        place = choice.place - layout.key_offset
        return index_of(layout, torch.where((place < 0) | (place >= layout.keys), -1, place))

    def state(self) -> State:
        return State(
            {
                "table": list(self.table),
                "sparsity": self.sparsity,
                "budget_tokens": self.budget_tokens,
                "local": self.local,
            }
        )

    def notes(self) -> tuple[str, ...]:
        full = [layer for layer, anchor in enumerate(self.table) if layer == anchor]
        if len(full) == len(self.table):
            return (f"all {len(full)} layers read all keys: none may reuse another's choice",)
        told = ", ".join(str(layer) for layer in full)
        return (
            f"{len(full)} of {len(self.table)} layers read all keys and choose (layers {told}); "
            "the others read what the latest of these chose",
        )
