"""The loss of a training from its size and its tokens: L(N, D) = E + A N^-α + B D^-β.

With the average number of parameters at work for N (:mod:`.parameters`), one law holds for dense
and for sparse pre-training.
Shapes: R = runs, S = starts.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from gossamer.core import GossamerError, check_count

__all__ = ["FittedLaw", "ScalingLaw", "fit_scaling_law"]

Array = NDArray[np.float64]

_LEAST = 6
_DISTINCT = 3
_REFINED = 40
_POLISHED = 3
_ROUGHLY, _EXACTLY = 40, 500  # iterations for every start, and for the best few of them
_EXPONENTS = (0.1, 0.3, 0.5, 1.0, 1.5)
_SHARES = (0.02, 0.1, 0.3, 0.7)
_STEEPEST = 5.0


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A N^-α + B D^-β.

    Parameters
    ----------
    E : loss that no size and no data takes away. A, alpha : what more parameters take away.
    B, beta : what more tokens take away.

    >>> round(ScalingLaw(1.69, 406.4, 0.34, 410.7, 0.28).loss(70e9, 1.4e12), 3)
    1.937
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> Any:
        """The loss of trainings: a number for numbers, an array for arrays.

        Parameters
        ----------
        parameters : of a dense model, or on average over the tokens. tokens : seen.
        """
        n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
        found = self.E + self.A * n**-self.alpha + self.B * d**-self.beta
        return float(found) if found.ndim == 0 else found

    def error(self, parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> float:
        """Mean of |predicted / measured - 1| over runs."""
        n, d, measured = _runs(parameters, tokens, losses)
        return float(np.abs(self.loss(n, d) / measured - 1.0).mean())


@dataclass(frozen=True)
class FittedLaw:
    """A law with what its runs say of it.

    Parameters
    ----------
    law : of all runs.
    intervals : coefficient to its bounds, from bootstraps; None where none were drawn.
    error : mean relative error on the runs it was fitted to.
    held_out : the same on runs a bootstrap did not draw, under the law of those it drew; None
        where none were drawn.
    runs, level : how many, and the share of bootstraps inside the bounds.
    """

    law: ScalingLaw
    intervals: dict[str, tuple[float, float]] | None
    error: float
    held_out: float | None
    runs: int
    level: float

    def __str__(self) -> str:
        lines = [f"L(N, D) = E + A N^-alpha + B D^-beta, fitted to {self.runs} runs"]
        for field in fields(self.law):
            value = getattr(self.law, field.name)
            text = f"  {field.name:5s} {value:12.5g}"
            if self.intervals is not None:
                low, high = self.intervals[field.name]
                text += f"   {self.level:.0%}: {low:.4g} to {high:.4g}"
            lines.append(text)
        outside = "" if self.held_out is None else f"; on runs left out {self.held_out:.2%}"
        lines.append(f"  error {self.error:.2%} of the loss{outside}")
        return "\n".join(lines)


def fit_scaling_law(
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    *,
    delta: float = 1e-3,
    draws: int = 100,
    level: float = 0.9,
    seed: int = 0,
) -> FittedLaw:
    """Fit the law to trainings, robustly and in the logarithm of the loss.

    Minimises the Huber loss of log L(N, D) - log(measured) by L-BFGS from a grid of starts.

    Parameters
    ----------
    parameters : (R,) of each run, above 0; embeddings in or out, but alike in all runs.
    tokens : (R,) seen by each run, above 0. losses : (R,) in the end, on held-out text, above 0.
    delta : where the Huber loss turns from squares to absolute values.
    draws : bootstraps over settings (N, D); 0 for none. level : of the intervals.
    seed : of the bootstraps.

    Raises
    ------
    GossamerError
        If a value is no number above 0, or the runs cannot tell the terms apart: fewer than 6
        settings, 3 sizes or 3 numbers of tokens.

    Source: arXiv 2203.15556, appendix D.3 (approach 3); arXiv 2501.12486 with N̄ for N.

    Departs from the paper: starts lie around the runs' own losses instead of on one grid for all,
    the best 40 are refined, 3 of them to the end; exponents are kept within 0 and 5.

    Examples
    --------
    >>> n, d = np.meshgrid([1e6, 3e6, 1e7, 3e7], [1e8, 1e9, 1e10])
    >>> measured = ScalingLaw(1.5, 400.0, 0.35, 900.0, 0.3).loss(n.ravel(), d.ravel())
    >>> fitted = fit_scaling_law(n.ravel(), d.ravel(), measured, draws=0)
    >>> round(fitted.law.alpha, 3), round(fitted.law.E, 3)
    (0.35, 1.5)
    """
    n, d, measured = _runs(parameters, tokens, losses)
    if not delta > 0:
        raise GossamerError(f"delta is {delta!r}; give an error of log loss above 0, as 0.001")
    if not 0 < level < 1:
        raise GossamerError(f"level is {level!r}; give a share between 0 and 1, as 0.9")
    check_count("draws", draws, 0)
    order = np.lexsort((measured, d, n))  # the order of runs decides nothing
    n, d, measured = n[order], d[order], measured[order]
    _check_settings(n, d)
    # On five unknowns the solver's threads wait for one another: fifty times the processor's time.
    with threadpool_limits(1, user_api="blas"):
        law, likely = _fit(n, d, measured, delta, None)
        drawn, outside = _bootstrap((n, d, measured), delta, likely, draws, seed)
    intervals = None
    if drawn:
        cut = 0.5 * (1.0 - level)
        intervals = {
            field.name: tuple(
                float(q)
                for q in np.quantile([getattr(one, field.name) for one in drawn], (cut, 1 - cut))
            )
            for field in fields(law)
        }
    return FittedLaw(
        law=law,
        intervals=intervals,  # type: ignore[arg-type]
        error=law.error(n, d, measured),
        held_out=float(np.mean(outside)) if outside else None,
        runs=len(n),
        level=level,
    )


def _runs(parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> tuple[Array, ...]:
    names = ("parameters", "tokens", "losses")
    arrays = [np.asarray(v, np.float64).reshape(-1) for v in (parameters, tokens, losses)]
    if len({len(values) for values in arrays}) != 1:
        lengths = ", ".join(f"{len(v)} {name}" for name, v in zip(names, arrays, strict=True))
        raise GossamerError(f"{lengths}: give one of each for every run")
    for name, values in zip(names, arrays, strict=True):
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            at = int(wrong.argmax())
            raise GossamerError(f"{name}[{at}] is {values[at]}; give a number above 0 in every run")
    return tuple(arrays)


def _check_settings(n: Array, d: Array) -> None:
    settings = len({*zip(n.tolist(), d.tolist(), strict=True)})
    sizes, lengths = len(np.unique(n)), len(np.unique(d))
    if sizes < _DISTINCT:
        raise GossamerError(
            f"the runs have {sizes} size{'s' * (sizes > 1)}; what more parameters take away needs "
            f"at least {_DISTINCT}: train other sizes"
        )
    if lengths < _DISTINCT:
        raise GossamerError(
            f"the runs saw {lengths} number{'s' * (lengths > 1)} of tokens; what more tokens take "
            f"away needs at least {_DISTINCT}: train shorter or longer"
        )
    if settings < _LEAST:
        raise GossamerError(
            f"{settings} settings of size and tokens are too few for 5 coefficients; "
            f"train at least {_LEAST}"
        )


def _terms(points: Array, n: Array, d: Array) -> Array:
    """Logarithms of A N^-α, B D^-β and E at centred log N and log D: (..., 3, R)."""
    a, alpha, b, beta, e = (points[..., i, None] for i in range(5))
    return np.stack(np.broadcast_arrays(a - alpha * n, b - beta * d, e + 0.0 * n), axis=-2)


def _huber(points: Array, n: Array, d: Array, target: Array, delta: float) -> tuple[Array, Array]:
    """Sum of Huber losses in units of delta, (...,), and its gradient, (..., 5)."""
    terms = _terms(points, n, d)
    top = terms.max(axis=-2, keepdims=True)
    parts = np.exp(terms - top)
    total = parts.sum(axis=-2)
    # In units of delta, so that the solver's tolerances mean the same for any delta.
    off = (np.log(total) + top[..., 0, :] - target) / delta
    small = np.abs(off) <= 1.0
    value = np.where(small, 0.5 * off**2, np.abs(off) - 0.5).sum(-1)
    slope = np.clip(off, -1.0, 1.0) / delta
    share = slope[..., None, :] * parts / total[..., None, :]
    by_n, by_d, by_e = share[..., 0, :], share[..., 1, :], share[..., 2, :]
    gradient = [by_n.sum(-1), -(by_n * n).sum(-1), by_d.sum(-1), -(by_d * d).sum(-1), by_e.sum(-1)]
    return value, np.stack(gradient, axis=-1)


def _starts(target: Array) -> Array:
    """Shares of the lowest loss for each term, and exponents: (S, 5)."""
    low = float(target.min())
    shares = [low + float(np.log(share)) for share in _SHARES]
    grid = product(shares, _EXPONENTS, shares, _EXPONENTS, [*shares, low + float(np.log(0.95))])
    return np.array(list(grid))


def _fit(
    n: Array, d: Array, measured: Array, delta: float, starts: Callable[[], Array] | None
) -> tuple[ScalingLaw, Array]:
    """The law of least Huber loss, and the refined points, best first, in logarithms of (N, D)."""
    mid_n, mid_d = float(np.log(n).mean()), float(np.log(d).mean())
    x, y, target = np.log(n) - mid_n, np.log(d) - mid_d, np.log(measured)
    middle = np.array([mid_n, mid_d])
    if starts is None:
        points = _starts(target)
        value, _ = _huber(points, x, y, target, delta)
        points = points[np.argsort(value, kind="stable")[:_REFINED]]
    else:
        points = starts().copy()
        points[:, [0, 2]] -= points[:, [1, 3]] * middle

    def objective(point: Array) -> tuple[float, Array]:
        value, gradient = _huber(point, x, y, target, delta)
        return float(value), gradient

    free, steep = (None, None), (0.0, _STEEPEST)

    def solve(points: Array, iterations: int) -> list[Any]:
        options = {"maxiter": iterations, "ftol": 1e-11, "gtol": 1e-9}
        found = [
            minimize(
                objective,
                point,
                jac=True,
                method="L-BFGS-B",
                bounds=(free, steep, free, steep, free),
                options=options,
            )
            for point in points
        ]
        return sorted(found, key=lambda result: float(result.fun))

    found = solve(points, _ROUGHLY)
    found = solve(np.array([result.x for result in found[:_POLISHED]]), _EXACTLY)
    refined = np.array([result.x for result in found])
    refined[:, [0, 2]] += refined[:, [1, 3]] * middle
    a, alpha, b, beta, e = (float(v) for v in refined[0])
    law = ScalingLaw(E=np.exp(e).item(), A=np.exp(a).item(), alpha=alpha, B=np.exp(b).item(),
                     beta=beta)  # fmt: skip
    return law, refined


def _bootstrap(
    runs: tuple[Array, Array, Array], delta: float, likely: Array, draws: int, seed: int
) -> tuple[list[ScalingLaw], list[float]]:
    """Laws of resampled settings, and their errors on the runs of settings not drawn."""
    n, d, measured = runs
    settings, of = np.unique(np.stack([n, d], axis=1), axis=0, return_inverse=True)
    members = [np.flatnonzero(of.reshape(-1) == i) for i in range(len(settings))]
    generator = np.random.default_rng(seed)
    laws: list[ScalingLaw] = []
    errors: list[float] = []
    for _ in range(20 * draws):
        if len(laws) == draws:
            break
        drawn = generator.integers(0, len(settings), len(settings))
        rows = np.concatenate([members[i] for i in drawn])
        try:
            _check_settings(n[rows], d[rows])
        except GossamerError:
            continue  # too few of something to fit: a draw that says nothing
        law, _ = _fit(n[rows], d[rows], measured[rows], delta, lambda: likely[:1])
        laws.append(law)
        left = np.setdiff1d(np.arange(len(n)), rows)
        errors.extend(np.abs(law.loss(n[left], d[left]) / measured[left] - 1.0).tolist())
    return laws, errors
