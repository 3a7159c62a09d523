"""Rules that turn one level into gates for all layers, from nothing removed to everything.

PPL-p% sparsity needs one number to bisect. The metric's own is the error level of CETT; its
baselines move a count per token or a threshold on the activated gate, common to all layers.
"""

from collections.abc import Callable
from typing import Literal

from torch import nn

from gossamer.core import QuantileSketch
from gossamer.methods.activations.calibration import active_experts, sketch_of
from gossamer.methods.activations.gates import Gate, Tap, input_taps
from gossamer.methods.activations.levels import DOWN_ROLES, cett_curves
from gossamer.methods.activations.neurons import neuron_taps
from gossamer.models import Block, Progress, SiteMap, Tokens, stream

__all__ = ["Rule", "gates_by"]

Rule = Literal["cett", "topk", "fat", "plain"]


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
        gate|; ``plain``, one threshold on |a_j|, without what the neuron writes. The level of the
        last two is a quantile over all layers.
    data : calibration tokens.
    """
    if rule == "cett":
        return cett_curves(model, data, batch_size=batch_size, progress=progress).gates
    active = active_experts(model, sites)
    taps: list[Tap] = []
    for block in range(len(sites.blocks)):
        inside = sites.in_block(block)
        plain = rule == "plain"
        taps += (
            input_taps(inside, DOWN_ROLES, active) if plain else neuron_taps(model, inside, active)
        )
    if rule == "topk":
        return lambda level: [tap.gate_keeping(level) for tap in taps]
    return _common_threshold(model, sites, taps, data, batch_size, progress)


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
        for tap in taps:
            if tap.block == block.index:
                sketches[tap.name] = sketch_of(model, block, tap)

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
