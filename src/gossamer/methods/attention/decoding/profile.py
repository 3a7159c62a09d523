"""How layers take to reading fewer keys, and to reading the keys of another layer.

Measured on the last queries of some sequences, as decoding would see them; from it a dynamic
programme finds the cheapest table of anchors.
Shapes: L = layers, G = key-value heads, R = query heads of one, n = queries looked at, K = keys,
k = keys chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.scores.attention_estimate import last_query_weights
from gossamer.methods.attention.decoding.choose import Amount
from gossamer.methods.attention.decoding.record import record
from gossamer.methods.attention.executor import Call, explicit_attend
from gossamer.methods.attention.layout import Layout
from gossamer.models import Progress, Tokens

__all__ = ["Costs", "Profile", "Profiler", "anchor_cost", "best_anchors", "profile"]


@dataclass(frozen=True, eq=False)
class Profile:
    """What was measured.

    Parameters
    ----------
    sensitivity : (L,), 1 - cosine of a layer's output over its own best keys and over all.
    similarity : (L, L), entry (a, l) for a <= l: share of layer l's best keys among layer a's,
        beyond chance: 1 for the same keys, 0 for as many as keys drawn by lot would share.
    """

    sensitivity: Tensor
    similarity: Tensor


@dataclass(frozen=True)
class Costs:
    """What a table is charged for, and what it may not do.

    Parameters
    ----------
    full, sparse : of a layer that reads all keys, and of one that reads its anchor's.
    unlike : times 1 - similarity, for every layer that reads its anchor's.
    tolerance : largest sensitivity of a layer that may read few keys.
    overlap : least similarity to its anchor, beyond chance.
    """

    full: float = 1.0
    sparse: float = 0.0
    unlike: float = 1.0
    tolerance: float = 0.1
    overlap: float = 0.5

    def of(self, found: Profile, anchor: int, layer: int) -> float:
        """Of one layer with an anchor; infinite where that is not allowed."""
        if anchor == layer:
            return self.full
        like = float(found.similarity[anchor, layer])
        if layer == 0 or float(found.sensitivity[layer]) > self.tolerance or like < self.overlap:
            return float("inf")
        return self.sparse + self.unlike * (1.0 - like)


def anchor_cost(table: Sequence[int], found: Profile, costs: Costs) -> float:
    """Of a whole table: the objective of :func:`best_anchors`."""
    return sum(costs.of(found, anchor, layer) for layer, anchor in enumerate(table))


def best_anchors(found: Profile, costs: Costs) -> tuple[int, ...]:
    """The cheapest table in which every layer reads the latest anchor at or before it.

    F(l, l) = min over a of F(l - 1, a) + full; F(l, a) = F(l - 1, a) + cost of l reading a.
    Equal costs: the anchor further back, which is the one with fewer full layers so far.
    """
    layers = len(found.sensitivity)
    cost = {0: costs.full}
    steps: list[dict[int, int]] = [{0: 0}]
    for layer in range(1, layers):
        cheapest = min(cost, key=lambda anchor: (cost[anchor], anchor))
        now, came = {layer: cost[cheapest] + costs.full}, {layer: cheapest}
        for anchor, before in cost.items():
            there = before + costs.of(found, anchor, layer)
            if there < float("inf"):
                now[anchor], came[anchor] = there, anchor
        cost = now
        steps.append(came)
    table = [min(cost, key=lambda anchor: (cost[anchor], anchor))]
    for came in reversed(steps[1:]):
        table.append(came[table[-1]])
    return tuple(reversed(table))


class Profiler:
    """Sums over the attention calls it is shown, layer after layer.

    Parameters
    ----------
    amount : keys chosen per query. queries : last real queries of each call looked at.
    """

    def __init__(self, amount: Amount, queries: int) -> None:
        self.amount, self.queries = amount, queries
        self._away: dict[int, list[float]] = {}
        self._shared: dict[tuple[int, int], list[float]] = {}
        self._chosen: dict[int, Tensor] = {}

    @torch.no_grad()
    def visit(self, call: Call, layout: Layout, layer: int) -> None:
        """Look at one call; layer 0 begins a new pass of the model."""
        if layer == 0:
            self._chosen.clear()
        rows = _last_rows(layout, self.queries)
        near, seen = _tail(call, rows), layout.mask(rows)
        weights = last_query_weights(
            near.grouped_query(), near.key, near.factor, seen, near.softcap
        )
        kept = _top(weights, seen, self.amount)
        _note(self._away.setdefault(layer, [0.0, 0.0]), _distance(near, seen, kept))
        self._chosen[layer] = kept
        for anchor, theirs in self._chosen.items():
            if theirs.shape == kept.shape:
                found = _agreement(theirs, kept, seen)
                _note(self._shared.setdefault((anchor, layer), [0.0, 0.0]), found)

    @property
    def found(self) -> Profile:
        """The means."""
        layers = max(self._away) + 1
        away = [self._away[layer][0] / self._away[layer][1] for layer in range(layers)]
        similarity = torch.zeros(layers, layers)
        for (anchor, layer), (total, count) in self._shared.items():
            similarity[anchor, layer] = max(0.0, total / count)
        return Profile(torch.tensor(away), similarity)


def profile(
    model: nn.Module,
    tokens: Tokens,
    amount: Amount,
    queries: int,
    progress: Progress | None = None,
) -> Profile:
    """Measure a model on some sequences: see :class:`Profiler`."""
    profiler = Profiler(amount, queries)
    record(model, tokens, profiler.visit, progress)
    return profiler.found


def _note(place: list[float], values: Tensor) -> None:
    place[0] += float(values.double().sum())
    place[1] += values.numel()


def _last_rows(layout: Layout, queries: int) -> slice:
    """The last queries that are no padding, for one sequence."""
    end = layout.queries
    if layout.padding is not None:
        real = layout.padding[0, layout.query_index].nonzero()
        end = int(real[-1]) + 1 if len(real) else end
    return slice(max(0, end - queries), end)


def _tail(call: Call, rows: slice) -> Call:
    return Call(
        call.query[:, :, rows],
        call.key,
        call.value,
        scale=call.scale,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
    )


def _top(weights: Tensor, seen: Tensor, amount: Amount) -> Tensor:
    """Bool (1, G, n, K): the best visible keys of every query."""
    keep = amount.of(seen.sum(-1)[:, 0])
    score = weights.masked_fill(~seen, -1.0)
    top = score.topk(int(keep.max()), dim=-1).indices
    rank = torch.arange(top.shape[-1], device=top.device)
    kept = torch.zeros_like(weights, dtype=torch.bool)
    return kept.scatter(3, top, (rank < keep[:, None, :, None]).expand_as(top)) & seen


def _agreement(theirs: Tensor, kept: Tensor, seen: Tensor) -> Tensor:
    """Share of the kept keys that are among theirs, beyond chance, (1, G, n); at most 1.

    Half of the keys drawn by lot hold half of any others: without the correction the same
    threshold would let every layer reuse any other at a small sparsity, and none at a large one.
    """
    share = (theirs & kept).sum(-1) / kept.sum(-1).clamp_min(1)
    chance = theirs.sum(-1) / seen.sum(-1).clamp_min(1)
    return torch.where(chance < 1, (share - chance) / (1 - chance), 1.0)


def _distance(call: Call, seen: Tensor, kept: Tensor) -> Tensor:
    """1 - cosine between the outputs over the kept keys and over all, (1, G, R, n)."""
    query = call.grouped_query()
    dense = explicit_attend(call, query, call.key, call.value, seen)
    sparse = explicit_attend(call, query, call.key, call.value, kept)
    return 1.0 - torch.nn.functional.cosine_similarity(dense.float(), sparse.float(), dim=-1)
