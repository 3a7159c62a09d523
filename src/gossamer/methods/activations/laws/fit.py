"""The sparsing laws: how the share of active neurons moves with the tokens a model was trained on.

ReLU models grow sparser, A(D) = exp(-c D^alpha + b) + A0; SiLU models grow denser,
A(D) = A0 - c / D^alpha. A0 is what remains in the limit. Shapes: n points.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log
from typing import Any, Literal

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import spearmanr
from scipy.stats import t as student

from gossamer.core import GossamerError

__all__ = ["Kind", "Law", "fit_law", "trend"]

Kind = Literal["relu", "silu"]
_NAMES: dict[str, tuple[str, ...]] = {
    "relu": ("c", "alpha", "b", "A0"),
    "silu": ("c", "alpha", "A0"),
}


def _relu(d: np.ndarray, c: float, alpha: float, b: float, a0: float) -> np.ndarray:
    return np.exp(-c * d**alpha + b) + a0


def _silu(d: np.ndarray, c: float, alpha: float, a0: float) -> np.ndarray:
    return a0 - c / d**alpha


_FORMS: dict[str, Callable[..., np.ndarray]] = {"relu": _relu, "silu": _silu}


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Parameters
    ----------
    kind : ``relu`` (falling) or ``silu`` (rising).
    values : parameter name to value: c, alpha, b (ReLU only), A0.
    bounds : parameter name to its 95 % confidence interval (Student's t on the fit's
        covariance); infinite where the points do not fix the parameter.
    unit : D is counted in units of this many tokens, so that c and b have a readable size.
    error : root mean square distance of the points from the law.
    r2 : share of the points' variance explained.
    points : number of points fitted.
    """

    kind: Kind
    values: dict[str, float]
    bounds: dict[str, tuple[float, float]]
    unit: float
    error: float
    r2: float
    points: int

    @property
    def limit(self) -> float:
        """A0, the share of active neurons after endless training."""
        return self.values["A0"]

    def __call__(self, tokens: float) -> float:
        """Share of active neurons after a number of training tokens."""
        found = _FORMS[self.kind](np.asarray([tokens / self.unit]), *self.values.values())
        return float(found[0])

    def __str__(self) -> str:
        form = {
            "relu": "A(D) = exp(-c D^alpha + b) + A0",
            "silu": "A(D) = A0 - c / D^alpha",
        }[self.kind]
        parts = [
            f"{name} {value:.3g} ({_interval(self.bounds[name])})"
            for name, value in self.values.items()
        ]
        return (
            f"{form}, D in {self.unit:,.0f} tokens: {', '.join(parts)}; R2 {self.r2:.3f}, "
            f"rms error {self.error:.4f} over {self.points} points"
        )


def _interval(bounds: tuple[float, float]) -> str:
    return "not fixed" if not all(map(isfinite, bounds)) else f"{bounds[0]:.3g} to {bounds[1]:.3g}"


def fit_law(tokens: Sequence[float], active: Sequence[float], kind: Kind) -> Law:
    """Fit a sparsing law by least squares, from several starts.

    Parameters
    ----------
    tokens : tokens trained on, above 0, at least one more point than the law has parameters.
    active : share of active neurons at each, 0 to 1.
    kind : ``relu`` or ``silu``.

    Raises
    ------
    GossamerError
        If there are too few points, one is impossible, or no fit converges.
    """
    if kind not in _FORMS:
        raise GossamerError(f"kind is {kind!r}; choose from relu, silu")
    names = _NAMES[kind]
    d, a = np.asarray(tokens, dtype=float), np.asarray(active, dtype=float)
    if d.ndim != 1 or d.shape != a.shape or len(d) <= len(names):
        raise GossamerError(
            f"{d.size} token counts and {a.size} shares cannot fix {len(names)} parameters; "
            f"give at least {len(names) + 1} points"
        )
    if not (np.all(d > 0) and np.all(np.isfinite(d)) and np.all((a >= 0) & (a <= 1))):
        raise GossamerError("token counts must be above 0 and shares between 0 and 1")
    unit = float(np.exp(np.mean(np.log(d))))
    best: tuple[float, Any, Any] | None = None
    for start in _starts(kind, d / unit, a):
        found = _try(kind, d / unit, a, start)
        if found is not None and (best is None or found[0] < best[0] - 1e-15):
            best = found
    if best is None:
        raise GossamerError("the law could not be fitted to these points; look at them for a trend")
    squares, values, covariance = best
    spread = student.ppf(0.975, len(d) - len(names)) * np.sqrt(np.diag(covariance))
    bounds = {
        name: (float(v - s), float(v + s)) if isfinite(s) else (-inf, inf)
        for name, v, s in zip(names, values, spread, strict=True)
    }
    total = float(np.sum((a - a.mean()) ** 2))
    return Law(
        kind=kind,
        values={name: float(v) for name, v in zip(names, values, strict=True)},
        bounds=bounds,
        unit=unit,
        error=float(np.sqrt(squares / len(d))),
        r2=1.0 - squares / total if total > 0 else 0.0,
        points=len(d),
    )


def _starts(kind: Kind, d: np.ndarray, a: np.ndarray) -> list[tuple[float, ...]]:
    span = max(float(a.max() - a.min()), 1e-3)
    if kind == "silu":
        return [
            (span * s, alpha, float(a.max()) + 0.1 * span)
            for alpha in (0.1, 0.3, 1.0)
            for s in (0.2, 1.0)
        ]
    floor = max(float(a.min()) - 0.1 * span, 0.0)
    return [
        (c, alpha, log(span) + c, floor * part)
        for alpha in (0.1, 0.3, 1.0)
        for c in (0.3, 1.0, 3.0)
        for part in (0.0, 1.0)
    ]


def _try(
    kind: Kind, d: np.ndarray, a: np.ndarray, start: tuple[float, ...]
) -> tuple[float, Any, Any] | None:
    form, wide = _FORMS[kind], 50.0
    # c and alpha above 0 make the law fall (or rise); the limit is a share.
    if kind == "relu":
        limits = ([1e-9, 1e-3, -wide, 0.0], [wide, 5.0, wide, 1.0])
    else:
        limits = ([1e-9, 1e-3, 0.0], [wide, 5.0, 1.0])
    inside = np.clip(start, np.asarray(limits[0]) + 1e-9, np.asarray(limits[1]) - 1e-9)
    with warnings.catch_warnings():
        # Said by infinite bounds instead.
        warnings.simplefilter("ignore", OptimizeWarning)
        try:
            values, covariance = curve_fit(form, d, a, p0=inside, bounds=limits, max_nfev=20_000)
        except (RuntimeError, ValueError):
            return None
    squares = float(np.sum((form(d, *values) - a) ** 2))
    return (squares, values, covariance) if isfinite(squares) else None


def trend(tokens: Sequence[float], active: Sequence[float]) -> float:
    """Spearman's rank correlation of active shares with training tokens, -1 to 1.

    0 for constant shares.
    """
    a = np.asarray(active, dtype=float)
    if a.size < 2 or np.all(a == a[0]):
        return 0.0
    found: Any = spearmanr(np.asarray(tokens, dtype=float), a)
    return float(found.statistic)
