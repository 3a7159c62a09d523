"""One error level for all layers: CETT thresholds, and the level a perplexity allows.

Neuron j adds n_j = a_j W_d[:, j] to its MLP's output. Dropping all neurons with |n_j| below a
threshold e loses CETT = |sum of the dropped n_j| / |W_d a|, norms in the output space. A level in
[0, 1] stands for the largest threshold of every layer whose mean CETT does not exceed it, so
layers that can spare more lose more. Shapes: T = tokens, F = neurons, H = outputs.

Source: arXiv 2402.03804 (CETT), arXiv 2411.02335 (PPL-p% sparsity).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, fsum
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, QuantileSketch, Site
from gossamer.methods.activations.calibration import (
    active_experts,
    observed,
    sketches_of,
    token_loss,
)
from gossamer.methods.activations.gates import Gate, Tap, input_taps
from gossamer.models import Block, Inputs, Progress, Tokens, as_tokens, find_sites, stream

__all__ = [
    "Curve",
    "Curves",
    "LevelGates",
    "PerplexityLevel",
    "cett",
    "cett_curves",
    "cett_gates",
    "column_norms",
    "perplexity_level",
    "ppl_sparsity",
]

DOWN_ROLES = ("mlp.down", "experts.down")
_SHARES = (*(i / 10 for i in range(1, 10)), 0.15, 0.25, 0.35, 0.95, 0.99, 1.0)
_ROWS = 1024  # tokens of a layer that errors are measured on
_PROBES = 8  # bisection steps between two points of a curve


def column_norms(site: Site, weight: Tensor) -> Tensor:
    """Norm of every column of a site's (O, I) matrix: float32 (I,)."""
    return torch.linalg.vector_norm(weight.float(), dim=0)


def cett(
    rows: Tensor,
    weight: Tensor,
    threshold: float,
    norms: Tensor | None = None,
    whole: Tensor | None = None,
) -> Tensor:
    """CETT of every token: norm of the sum of the dropped contributions over that of all.

    Parameters
    ----------
    rows : (T, F), what enters the down projection. weight : (H, F), that projection.
    threshold : neurons with |a_j| |W_d[:, j]| at or below it are dropped.
    norms : (F,) norms of the columns, and whole : (T,) norms of the outputs, where known.

    Returns
    -------
    (T,) float32, 0 for tokens whose MLP gives nothing.
    """
    weight, rows = weight.float(), rows.float()
    norms = torch.linalg.vector_norm(weight, dim=0) if norms is None else norms
    dropped = rows.masked_fill(rows.abs() * norms > threshold, 0)
    lost = torch.linalg.vector_norm(dropped @ weight.T, dim=1)
    whole = torch.linalg.vector_norm(rows @ weight.T, dim=1) if whole is None else whole
    return torch.where(whole > 0, lost / whole, torch.zeros_like(lost))


@dataclass(frozen=True, eq=False)
class Curve:
    """Mean CETT of a layer as a function of its threshold.

    Parameters
    ----------
    thresholds, errors : measured points, both ascending from (0, 0).
    sketch : of the scores, which tells the share a threshold removes.
    """

    tap: Tap
    thresholds: tuple[float, ...]
    errors: tuple[float, ...]
    sketch: QuantileSketch

    def threshold(self, level: float) -> float:
        """The largest threshold whose error does not exceed the level, between points linearly."""
        at = bisect_right(self.errors, level) - 1
        if at == len(self.errors) - 1:
            return self.thresholds[-1]
        low, high = self.errors[at], self.errors[at + 1]
        start, end = self.thresholds[at], self.thresholds[at + 1]
        return start + (end - start) * (level - low) / (high - low)

    def gate(self, level: float) -> Gate:
        """The layer's gate at an error level; its sparsity is what calibration removed."""
        threshold = self.threshold(level)
        share = self.sketch.share_below(threshold) if threshold > 0 else 0.0
        return self.tap.gate_at(threshold, share)


class LevelGates(list[Gate]):
    """Gates of all layers, and in ``fact`` the level they stand for, as a sentence."""

    def __init__(self, gates: Iterable[Gate], fact: str) -> None:
        super().__init__(gates)
        self.fact = fact


@dataclass(frozen=True, eq=False)
class Curves:
    """The curves of all layers."""

    curves: tuple[Curve, ...]

    def gates(self, level: float) -> list[Gate]:
        """Gates of all layers at one error level.

        Raises
        ------
        GossamerError
            Unless 0 <= level <= 1.
        """
        check_level(level)
        return [curve.gate(level) for curve in self.curves]

    def sparsity(self, level: float) -> float:
        """Share of the down projections' columns removed on the calibration data, by size."""
        return _mean(self.gates(level))

    def level_for(self, sparsity: float) -> float:
        """The level that removes a share of the columns, to 1e-6 of a level."""
        low, high = 0.0, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self.sparsity(middle) < sparsity else (low, middle)
        return high


def check_level(level: float) -> None:
    """Refuse an error level that is none."""
    if not isinstance(level, int | float) or not 0.0 <= level <= 1.0:
        raise GossamerError(f"level is {level!r}; it is a share of a layer's output, 0 to 1")


def _mean(gates: Iterable[Gate]) -> float:
    gates = list(gates)
    return fsum(g.sparsity * g.size for g in gates) / fsum(g.size for g in gates)


class _Errors:
    """Mean CETT of one layer on a sample of its rows."""

    def __init__(self, model: nn.Module, block: Block, tap: Tap, tokens: int) -> None:
        assert tap.weight is not None
        self.tap = tap
        stride, seen = max(1, -(-tokens // _ROWS)), 0
        parts: dict[int, list[Tensor]] = {}

        def see(rows: Tensor, expert: int | None) -> None:
            nonlocal seen
            first = -seen % stride
            seen += len(rows)
            parts.setdefault(expert or 0, []).append(rows[first::stride].clone())

        observed(model, block, [(tap, see)])
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for expert, found in parts.items():
            rows, weight = torch.cat(found).float(), tap.sites[expert].weight(model).float()
            whole = torch.linalg.vector_norm(rows @ weight.T, dim=1)
            self.parts.append((rows, weight, whole))

    def __call__(self, threshold: float) -> float:
        total, count = 0.0, 0
        for rows, weight, whole in self.parts:
            found = cett(rows, weight, threshold, self.tap.weight, whole)
            total += float(found.double().sum())
            count += len(found)
        return total / max(1, count)


def _curve(
    model: nn.Module, block: Block, tap: Tap, levels: Sequence[float], shares: Sequence[float]
) -> Curve:
    tap = tap.weighed(model, column_norms)
    sketch = sketches_of(model, block, [tap])[tap.name]
    error = _Errors(model, block, tap, sketch.tokens)
    # The sketch's last quantile is the middle of a bin; a hair more takes in its whole bin.
    points = {0.0: 0.0} | {t: error(t) for s in shares if (t := sketch.quantile(s) * 1.002) > 0}
    for level in levels:
        below = [t for t in points if points[t] <= level]
        above = [t for t in points if points[t] > level]
        if not above:
            continue
        low, high = max(below), min(above)
        for _ in range(_PROBES):
            middle = (low + high) / 2
            points[middle] = error(middle)
            low, high = (middle, high) if points[middle] <= level else (low, middle)
    found = sorted(points)
    # Mean CETT grows with the threshold but for rounding and the rare token that cancels.
    errors, most = [], 0.0
    for threshold in found:
        most = max(most, points[threshold])
        errors.append(most)
    return Curve(tap, tuple(found), tuple(errors), sketch)


@torch.no_grad()
def cett_curves(
    model: nn.Module,
    data: Any = None,
    levels: Sequence[float] = (),
    *,
    shares: Sequence[float] = _SHARES,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Curves:
    """Measure how the error of every layer grows with its threshold.

    Parameters
    ----------
    data : calibration text or tokens. levels : bisected exactly; others are interpolated.
    shares : quantiles of the score at which a curve is measured.

    Departs from the paper: thresholds are tried at 15 quantiles and bisected between them, not
    among 65,536 linear steps, and measured on at most 1,024 tokens of a layer; a bias of the down
    projection is no neuron's and counts on neither side.
    """
    sites = find_sites(model)
    tokens = data if isinstance(data, Inputs) else as_tokens(data, model)
    active = active_experts(model, sites)
    for level in levels:
        check_level(level)
    curves: list[Curve] = []

    def visit(block: Block) -> None:
        for tap in input_taps(block.sites, DOWN_ROLES, active):
            curves.append(_curve(model, block, tap, levels, shares))

    stream(
        model,
        tokens,
        frozenset(),
        visit,
        sites=sites,
        batch_size=batch_size,
        recompute=False,
        progress=progress,
    )
    return Curves(tuple(curves))


def cett_gates(model: nn.Module, data: Any = None, level: float = 0.2) -> list[Gate]:
    """Gates on the neurons of every MLP whose mean CETT on the data is the level.

    Parameters
    ----------
    data : calibration text or tokens. level : 0 to 1; 0.2 is the usual operating point.
    """
    return cett_curves(model, data, (level,)).gates(level)


@dataclass(frozen=True, eq=False)
class PerplexityLevel:
    """How much can go until the perplexity has grown by a given part.

    Parameters
    ----------
    level : the largest level found whose growth does not exceed the one allowed.
    growth : perplexity under the gates over dense perplexity, on the tokens searched on.
    sparsity : share of channels removed on them, weighted by what the gates' layers hold.
    shares : the same by gate. gates : those of the level.
    """

    level: float
    growth: float
    sparsity: float
    shares: Mapping[str, float]
    gates: tuple[Gate, ...]

    @property
    def ratio(self) -> float:
        """The growth, by the name the paper gives it."""
        return self.growth


def perplexity_level(
    model: nn.Module,
    tokens: Tokens,
    gates_at: Callable[[float], Sequence[Gate]],
    *,
    percent: float = 1.0,
    dense_prefix: int = 1,
    steps: int = 20,
) -> PerplexityLevel:
    """Bisect a level in [0, 1] until perplexity is ``1 + percent / 100`` times the dense one.

    Works for every way to turn a level into gates, hence for any activation and model.

    Parameters
    ----------
    tokens : the same at every step, so that the search is not led by noise.
    gates_at : a level to gates; 0 must remove nothing that matters.
    percent : growth of the perplexity allowed, above 0.
    steps : most evaluations; it ends earlier within 1 % of the growth.

    Raises
    ------
    GossamerError
        If percent is not above 0.
    """
    if not percent > 0:
        raise GossamerError(f"percent is {percent!r}; give a growth of perplexity above 0")
    sites = find_sites(model)
    dense, _ = token_loss(model, sites, tokens)
    wanted = 1.0 + percent / 100

    def at(level: float) -> PerplexityLevel:
        gates = tuple(gates_at(level))
        loss, shares = token_loss(model, sites, tokens, gates, dense_prefix)
        size = fsum(g.size for g in gates)
        mean = fsum(shares[g.name] * g.size for g in gates) / size if size else 0.0
        return PerplexityLevel(level, exp(min(loss - dense, 700.0)), mean, shares, gates)

    best, high = at(0.0), at(1.0)
    if high.growth <= wanted:
        return high
    low, top = 0.0, 1.0
    for _ in range(steps):
        found = at((low + top) / 2)
        if found.growth <= wanted:
            best, low = found, found.level
        else:
            top = found.level
        if abs(found.growth - wanted) <= 0.01 * (wanted - 1.0):
            return found
    return best


def ppl_sparsity(
    model: nn.Module,
    data: Any = None,
    search: Tokens | None = None,
    *,
    percent: float = 1.0,
    dense_prefix: int = 1,
) -> PerplexityLevel:
    """PPL-p% sparsity by CETT: one error level for all layers, as high as perplexity allows.

    Parameters
    ----------
    data : calibration text or tokens, which give every level its thresholds.
    search : tokens on which the perplexity is held; None takes the calibration tokens. Report
        what the gates do on other text, with ``calibration.token_loss``.
    """
    tokens = as_tokens(data, model)
    curves = cett_curves(model, tokens)
    return perplexity_level(
        model,
        tokens if search is None else search,
        curves.gates,
        percent=percent,
        dense_prefix=dense_prefix,
    )
