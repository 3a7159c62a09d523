"""Curve: held-out loss over sparsity, window by window, and what is read from it.

Two answers to "how sparse may it be": the largest sparsity within a tolerance, and the elbow of
two line segments. Both are read again from resampled windows, which gives their intervals.
Shapes: P sparsities (the first is dense), N windows, B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from gossamer.core import GossamerError, check_count
from gossamer.methods.weights.knee.fit import LEAST_POINTS, Elbow, fit
from gossamer.models.loss import WindowLosses

__all__ = ["Curve", "Essential", "parse_sweep"]

_MOST_POINTS = 1000


def parse_sweep(text: str) -> tuple[float, ...]:
    """Sparsities from ``start:stop:step`` with both ends, or a list, ``0.1,0.2`` or ``0.1 0.2``.

    >>> parse_sweep("0.2:0.8:0.2")
    (0.2, 0.4, 0.6, 0.8)

    Raises
    ------
    GossamerError
        Unless they rise and lie above 0 and below 1.
    """
    wrong = GossamerError(
        f"sweep is {text!r}; give start:stop:step such as 0.05:0.95:0.05, or rising sparsities "
        f"such as 0.3,0.5,0.7, above 0, below 1, at most {_MOST_POINTS:,}"
    )
    if not isinstance(text, str):
        raise wrong
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            count = int((stop - start) / step + 1e-9) + 1
            if not 0 < count <= _MOST_POINTS:
                raise wrong
            shares = tuple(round(start + i * step, 12) for i in range(count))
        else:
            shares = tuple(float(part) for part in text.replace(",", " ").split())
    except (ValueError, ZeroDivisionError, OverflowError):
        raise wrong from None
    rising = all(b > a for a, b in pairwise(shares))
    if not 0 < len(shares) <= _MOST_POINTS or not rising or not 0 < shares[0] <= shares[-1] < 1:
        raise wrong
    return shares


@dataclass(frozen=True)
class Essential:
    """The largest sparsity whose loss stays within a tolerance of the dense model's.

    Parameters
    ----------
    sparsity : that sparsity; 0 where no swept one stays within.
    tolerance : share of the dense loss that may be added. limit : the loss it allows.
    low, high : bounds of the interval around ``sparsity``, or None from a single window.
    broken : smaller sparsities that exceed the limit all the same.
    level : confidence of the interval.
    """

    sparsity: float
    tolerance: float
    limit: float
    low: float | None = None
    high: float | None = None
    broken: tuple[float, ...] = ()
    level: float = 0.95

    def __str__(self) -> str:
        text = f"essential sparsity {self.sparsity:.1%} at tolerance {self.tolerance:.1%}"
        if self.low is not None and self.high is not None:
            text += f" ({self.level:.0%} interval {self.low:.1%} to {self.high:.1%})"
        if self.broken:
            text += f"; {', '.join(f'{s:.1%}' for s in self.broken)} exceed it below that"
        return text


@dataclass(frozen=True, eq=False)
class Curve:
    """Losses of a model at rising sparsity.

    Parameters
    ----------
    sparsity : achieved shares removed, rising; the first is 0, the dense model.
    totals : (P, N) float64, summed loss of every window, in nats.
    counts : (N,) float64, scored tokens of every window.
    ceiling : loss of a model that knows nothing (log of the vocabulary), or None. Beyond it a
        curve only says how confidently wrong a destroyed model is, so the elbow leaves it out.
    patterns : what was applied at each sparsity, in words. asked : the sparsity asked for there,
        which rounding to whole weights of a row or block may miss.
    """

    sparsity: tuple[float, ...]
    totals: Tensor
    counts: Tensor
    ceiling: float | None = None
    patterns: tuple[str, ...] = ()
    asked: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        sparsity: Sequence[float],
        losses: Sequence[WindowLosses],
        ceiling: float | None = None,
        patterns: Sequence[str] = (),
        asked: Sequence[float] = (),
    ) -> "Curve":
        """From the losses measured at each sparsity, the dense model's first."""
        totals = torch.stack([loss.total for loss in losses])
        words = tuple(patterns), tuple(asked)
        return cls(tuple(sparsity), totals, losses[0].count, ceiling, *words)

    def __post_init__(self) -> None:
        if not self.sparsity or self.sparsity[0] != 0:
            raise GossamerError("a curve begins with the dense model, at sparsity 0")
        if any(b <= a for a, b in pairwise(self.sparsity)):
            raise GossamerError("the sparsities of a curve rise from point to point, none twice")
        if self.totals.shape != (len(self.sparsity), len(self.counts)):
            raise GossamerError(
                f"{len(self.sparsity)} sparsities and {len(self.counts)} windows need losses of "
                f"that shape; got {tuple(self.totals.shape)}"
            )

    @property
    def windows(self) -> int:
        """Number of windows measured."""
        return len(self.counts)

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss at each sparsity, in nats per token."""
        return tuple((self.totals.sum(1) / self.counts.sum()).tolist())

    @property
    def dense(self) -> float:
        """Loss of the dense model."""
        return self.losses[0]

    def resampled(self, draws: int = 1000, seed: int = 0) -> Tensor:
        """Curves from windows drawn with replacement, (B, P); the same windows at every sparsity.

        Pairing matters: most of the spread of a loss is the text's and drops out of differences.
        """
        check_count("draws", draws, 1)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(self.windows, (draws, self.windows), generator=generator)
        times = torch.zeros(draws, self.windows, dtype=torch.float64)
        times.scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float64))
        # Infinite losses would turn into NaN at windows drawn zero times.
        totals = self.totals.nan_to_num(nan=1e300, posinf=1e300)
        return (times @ totals.T) / (times @ self.counts)[:, None]

    def essential(self, tolerance: float = 0.01, draws: int = 1000) -> Essential:
        """The largest sparsity with a loss of at most (1 + tolerance) times the dense one."""
        if not isinstance(tolerance, int | float) or not isfinite(tolerance) or tolerance < 0:
            raise GossamerError(
                f"tolerance is {tolerance!r}; it is a share of the dense loss, at least 0"
            )
        limit = self.dense * (1 + tolerance)
        within = [loss <= limit for loss in self.losses]
        last = max(i for i, fine in enumerate(within) if fine or i == 0)
        broken = tuple(s for s, fine in zip(self.sparsity[:last], within, strict=False) if not fine)
        low = high = None
        if self.windows > 1:
            curves = self.resampled(draws)
            fine = curves <= curves[:, :1] * (1 + tolerance)
            places = torch.arange(len(self.sparsity)) * fine
            found = torch.tensor(self.sparsity, dtype=torch.float64)[places.amax(1)]
            low, high = _interval(found, 0.95)
        return Essential(self.sparsity[last], tolerance, limit, low, high, broken)

    @property
    def usable(self) -> int:
        """Points before the loss first exceeds the ceiling or is no number: those of the fit."""
        ceiling = self.ceiling
        if ceiling is not None and self.dense >= ceiling:
            ceiling = None  # The dense model knows nothing either, so the ceiling says nothing.
        for index, loss in enumerate(self.losses):
            if not isfinite(loss) or (ceiling is not None and loss > ceiling):
                return index
        return len(self.losses)

    def elbow(self, draws: int = 1000) -> Elbow | None:
        """The bend of two line segments, with its bootstrap interval; None from too few points."""
        count = self.usable
        if count < LEAST_POINTS:
            return None
        x = torch.tensor(self.sparsity[:count], dtype=torch.float64)
        y = torch.tensor(self.losses[:count], dtype=torch.float64)
        curves = self.resampled(draws)[:, :count] if self.windows > 1 else None
        return fit(x, y, curves)

    def to_dict(self, tolerance: float = 0.01) -> dict[str, Any]:
        """As plain values, for JSON; a loss that is no number is None."""
        elbow = self.elbow()
        return {
            "points": [
                {
                    "sparsity": share,
                    "loss": loss if isfinite(loss) else None,
                    "pattern": self.patterns[i] if self.patterns else None,
                }
                for i, (share, loss) in enumerate(zip(self.sparsity, self.losses, strict=True))
            ],
            "windows": self.windows,
            "tokens": int(self.counts.sum()),
            "ceiling": self.ceiling,
            "essential": vars(self.essential(tolerance)),
            "elbow": None if elbow is None else _plain(elbow),
        }

    def sentences(self, tolerance: float = 0.01) -> tuple[str, ...]:
        """The two answers in words, and the points they were read from."""
        elbow = self.elbow()
        if elbow is None:
            said = (
                f"no elbow: {self.usable} points below the loss of knowing nothing, "
                f"{LEAST_POINTS} are needed; sweep in smaller steps"
            )
        else:
            said = str(elbow)
        points = ", ".join(
            f"{share:.1%} {loss:.4f}"
            for share, loss in zip(self.sparsity, self.losses, strict=True)
        )
        tokens = f"{int(self.counts.sum()):,} tokens in {self.windows} windows"
        return str(self.essential(tolerance)), said, f"loss by sparsity ({tokens}): {points}"


def _interval(values: Tensor, level: float) -> tuple[float, float]:
    """Quantiles that are values themselves: a swept sparsity is not interpolated."""
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(values, tail, interpolation="nearest").tolist()
    return low, high


def _plain(elbow: Elbow) -> dict[str, Any]:
    steeper = elbow.steeper
    return {**vars(elbow), "steeper": steeper if isfinite(steeper) else None}
