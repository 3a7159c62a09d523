"""Fit: two joined line segments over a curve, and how certain their joint is.

Shapes: P points of a curve, B curves, C candidate joints.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["LEAST_POINTS", "Elbow", "fit", "joints"]

LEAST_POINTS = 5
"""Two segments have four parameters; fewer points than five leave nothing to judge them by."""
_CANDIDATES = 1000


@dataclass(frozen=True)
class Elbow:
    """The bend of a rising curve.

    Parameters
    ----------
    sparsity : where the two segments meet.
    before, after : their slopes, loss per unit of sparsity.
    explained : share of a single line's squared error that the second segment takes away, 0 to 1.
    low, high : bounds of the interval around ``sparsity``, or None without one.
    level : confidence of the interval.
    """

    sparsity: float
    before: float
    after: float
    explained: float
    low: float | None = None
    high: float | None = None
    level: float = 0.95

    @property
    def steeper(self) -> float:
        """How many times the slope after the elbow exceeds that before it; infinite from flat."""
        return self.after / self.before if self.before > 0 else inf

    def __str__(self) -> str:
        text = f"elbow at {self.sparsity:.1%}"
        if self.low is not None and self.high is not None:
            text += f" ({self.level:.0%} interval {self.low:.1%} to {self.high:.1%})"
        return f"{text}, slope {self.before:.3g} before and {self.after:.3g} after"


def _solve(x: Tensor, curves: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best joint of every curve: joint, slope before, slope after, share explained; (B,) each.

    Least squares over a grid of joints, 1,000 and the points themselves, each solved exactly.
    """
    # Two points lie on either side of a joint, itself included.
    grid = torch.linspace(float(x[1]), float(x[-2]), _CANDIDATES, dtype=torch.float64)
    grid = torch.cat([grid, x[1:-1]]).sort().values
    hinge = (x[None] - grid[:, None]).clamp_min(0)
    design = torch.stack([torch.ones_like(hinge), x.expand_as(hinge), hinge], 2)
    q, r = torch.linalg.qr(design)
    # (C, 3, B): each curve's coordinates in the space every joint spans.
    along = q.transpose(1, 2) @ curves.T
    total = (curves - curves.mean(1, keepdim=True)).square().sum(1)
    # Constant and slope come first in every basis, so any joint's second coordinate is the line's.
    line = (total - along[0, 1].square()).clamp_min(0)
    bend = along[:, 2] / r[:, 2, 2, None]
    gain = along[:, 2].square().masked_fill(bend <= 0, -1.0)
    best = gain.argmax(0)
    pick = torch.arange(len(curves))
    change = bend[best, pick]
    before = (along[best, 1, pick] - r[best, 1, 2] * change) / r[best, 1, 1]
    found = gain[best, pick]
    explained = (found / line.clamp_min(1e-300)).clamp(0, 1)
    # A curve that bends down nowhere bends up: it rises from its first point on.
    concave = found < 0
    slope = along[0, 1] / r[0, 1, 1]
    joint = torch.where(concave, x[0], grid[best])
    return (
        joint,
        torch.where(concave, slope, before),
        torch.where(concave, slope, before + change),
        explained.masked_fill(concave, 0.0),
    )


def _checked(sparsity: Tensor, curves: Tensor) -> None:
    if len(sparsity) < LEAST_POINTS:
        raise GossamerError(
            f"the curve has {len(sparsity)} usable points; an elbow needs {LEAST_POINTS}: "
            "sweep in smaller steps"
        )
    if bool((sparsity.diff() <= 0).any()):
        raise GossamerError("the sparsities of a curve rise from point to point, none twice")
    if not bool(torch.isfinite(curves).all()):
        raise GossamerError("the curve holds a loss that is no number; leave that point out")


def joints(sparsity: Tensor, curves: Tensor) -> Tensor:
    """Where the two segments of every curve meet, (B,).

    Parameters
    ----------
    sparsity : (P,), rising. curves : (B, P), higher is worse.
    """
    x, y = sparsity.double(), curves.double()
    _checked(x, y)
    return _solve(x, y)[0]


def fit(sparsity: Tensor, curve: Tensor, draws: Tensor | None = None, level: float = 0.95) -> Elbow:
    """The two-segment least-squares fit of a curve: flat, then steep.

    The joint is free, the segments meet there, and the second is steeper than the first. A curve
    that nowhere gets steeper rises from its first point on: the elbow is that point, and both
    slopes are those of the single line.

    Parameters
    ----------
    sparsity : (P,), rising. curve : (P,), higher is worse.
    draws : (B, P) curves from resampled data; their joints' quantiles are the interval.

    Raises
    ------
    GossamerError
        On fewer than 5 points, or a value that is no number.
    """
    x, y = sparsity.double(), curve.double()[None]
    _checked(x, y)
    joint, before, after, explained = (float(v) for v in _solve(x, y))
    low = high = None
    if draws is not None and len(draws):
        tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = torch.quantile(joints(x, draws), tail).tolist()
    return Elbow(joint, before, after, explained, low, high, level)
