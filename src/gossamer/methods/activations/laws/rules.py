"""Rules that turn one level into gates for all layers, from nothing removed to everything.

PPL-p% sparsity needs one number to bisect. The metric's own is the error level of CETT; its
baselines move a count per token or a threshold on the activated gate, common to all layers.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.core import QuantileSketch
from gossamer.methods.activations.calibration import active_experts, observed, sketches_of
from gossamer.methods.activations.gates import Gate, Tap, input_taps
from gossamer.methods.activations.levels import DOWN_ROLES, Curve, Curves, cett, cett_curves
from gossamer.methods.activations.neurons import neuron_taps
from gossamer.models import Block, Progress, SiteMap, Tokens, stream

__all__ = ["Rule", "gates_by"]

Rule = Literal["cett", "topk", "fat", "plain", "unweighted"]

_SHARES = tuple(i / 16 for i in range(1, 17))
_ROWS = 1024


def gates_by(
    rule: Rule,
    model: nn.Module,
    sites: SiteMap,
    data: Tokens,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Callable[[float], list[Gate]]:
    """A function from a level in [0, 1] to gates on the neurons of every MLP.

    Parameters
    ----------
    rule : ``cett``, the same mean error of every layer's output; ``topk``, the same number of
        neurons for every token and layer by |activated gate|; ``fat``, one threshold on |activated
        gate|; ``plain``, one threshold on |a_j|, without what the neuron writes; the level of these
        two is a quantile over all layers. ``unweighted`` is ``cett`` with neurons dropped in the
        order of |a_j|: what the column norms are worth.
    data : calibration tokens.
    """
    if rule == "cett":
        return cett_curves(model, data, batch_size=batch_size, progress=progress).gates
    active = active_experts(model, sites)
    taps: list[Tap] = []
    for block in range(len(sites.blocks)):
        inside = sites.in_block(block)
        plain = rule in ("plain", "unweighted")
        taps += (
            input_taps(inside, DOWN_ROLES, active) if plain else neuron_taps(model, inside, active)
        )
    if rule == "topk":
        return lambda level: [tap.gate_keeping(level) for tap in taps]
    common = _unweighted if rule == "unweighted" else _common_threshold
    return common(model, sites, taps, data, batch_size, progress)


def _unweighted(
    model: nn.Module,
    sites: SiteMap,
    taps: list[Tap],
    data: Tokens,
    batch_size: int,
    progress: Progress | None,
) -> Callable[[float], list[Gate]]:
    curves: list[Curve] = []

    def visit(block: Block) -> None:
        for tap in (tap for tap in taps if tap.block == block.index):
            curves.append(_plain_curve(model, block, tap))

    stream(
        model,
        data,
        frozenset(),
        visit,
        sites=sites,
        batch_size=batch_size,
        recompute=False,
        progress=progress,
    )
    return Curves(tuple(curves)).gates


def _plain_curve(model: nn.Module, block: Block, tap: Tap) -> Curve:
    """Mean CETT of a layer by a threshold on |a_j|, at 16 quantiles."""
    sketch = sketches_of(model, block, [tap])[tap.name]
    stride, parts = max(1, -(-sketch.tokens // _ROWS)), dict[int, list[Tensor]]()

    def see(rows: Tensor, expert: int | None) -> None:
        parts.setdefault(expert or 0, []).append(rows[::stride].clone())

    observed(model, block, [(tap, see)])
    points = {0.0: 0.0}
    for share in _SHARES:
        threshold, total, count = sketch.quantile(share) * 1.002, 0.0, 0
        for expert, found in parts.items():
            weight = tap.sites[expert].weight(model)
            lost = cett(torch.cat(found), weight, threshold, torch.ones(tap.features))
            total, count = total + float(lost.double().sum()), count + len(lost)
        points[threshold] = total / max(1, count)
    thresholds = sorted(points)
    errors = list(accumulate((points[t] for t in thresholds), max))
    return Curve(tap, tuple(thresholds), tuple(errors), sketch)


def _common_threshold(
    model: nn.Module,
    sites: SiteMap,
    taps: list[Tap],
    data: Tokens,
    batch_size: int,
    progress: Progress | None,
) -> Callable[[float], list[Gate]]:
    sketches: dict[str, QuantileSketch] = {}

    def visit(block: Block) -> None:
        here = [tap for tap in taps if tap.block == block.index]
        sketches.update(sketches_of(model, block, here))

    stream(
        model,
        data,
        frozenset(),
        visit,
        sites=sites,
        batch_size=batch_size,
        recompute=False,
        progress=progress,
    )
    pooled = QuantileSketch(1)
    for sketch in sketches.values():
        pooled.counts += sketch.counts.to(pooled.counts.device)
        pooled.tokens += sketch.tokens

    def gates(level: float) -> list[Gate]:
        # Half a bin above the quantile takes in the whole bin it lies in.
        threshold = pooled.quantile(level) * 1.002
        if level <= 0 or threshold <= 0:
            return [tap.gate_at(0.0, 0.0) for tap in taps]
        return [tap.gate_at(threshold, sketches[tap.name].share_below(threshold)) for tap in taps]

    return gates
