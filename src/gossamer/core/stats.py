"""Stat: what must be measured on data before a method can decide.

Accumulators take one batch of activations at a time and keep fp32 or fp64 sums, so a value
does not depend on the batch size (beyond rounding). Shapes: T = valid tokens, I = in features.
"""

import math
from abc import ABC, abstractmethod
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

__all__ = ["Accumulator", "Gradient", "Hessian", "InputMoments", "InputNorm", "QuantileSketch", "Stat"]


class Stat(Enum):
    """A measurement a method can ask the calibration driver for (``needs``)."""

    INPUT_L2 = "input_l2"
    INPUT_MOMENTS = "input_moments"
    INPUT_QUANTILES = "input_quantiles"
    HESSIAN = "hessian"
    GRADIENT = "gradient"

    def accumulator(self, features: int, device: torch.device | None = None) -> "Accumulator":
        """A fresh accumulator for an input of ``features`` channels."""
        return _ACCUMULATORS[self](features, device)


class Accumulator(ABC):
    """A running statistic of the rows it is shown."""

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self.features = features
        self.tokens = 0
        self.device = device or torch.device("cpu")

    def update(self, rows: Tensor) -> None:
        """Take in (T, I) rows; T may be 0.

        Raises
        ------
        GossamerError
            If the width is not the one this accumulator was made for, or a row is not finite.
        """
        if rows.dim() != 2 or rows.shape[1] != self.features:
            raise GossamerError(
                f"a statistic over {self.features} channels takes (tokens, {self.features}); "
                f"got {tuple(rows.shape)}"
            )
        if not len(rows):
            return
        rows = rows.detach().float()
        if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
            raise GossamerError(
                "calibration activations hold NaN or infinity; load the model in float32"
            )
        self.tokens += len(rows)
        self._add(rows)

    @abstractmethod
    def _add(self, rows: Tensor) -> None: ...

    @abstractmethod
    def value(self) -> Any:
        """The statistic of all rows seen."""

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, Tensor))


class InputNorm(Accumulator):
    """L2 norm of every input channel over all tokens: sqrt(sum over t of x_tj²)."""

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        super().__init__(features, device)
        self.squares = torch.zeros(features, dtype=torch.float64, device=self.device)

    def _add(self, rows: Tensor) -> None:
        # Summed in fp32 inside a batch, in fp64 across batches: no copy of the batch in fp64.
        self.squares += torch.linalg.vector_norm(rows, dim=0).double().square()

    def value(self) -> Tensor:
        """(I,) float32."""
        return self.squares.sqrt().float()


class InputMoments(Accumulator):
    """Mean and (biased) variance of every input channel."""

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        super().__init__(features, device)
        self.mean = torch.zeros(features, dtype=torch.float64, device=self.device)
        self.spread = torch.zeros(features, dtype=torch.float64, device=self.device)

    def _add(self, rows: Tensor) -> None:
        # Chan's parallel update: stable where E[x²] - E[x]² would cancel.
        count, rows = len(rows), rows.double()
        mean = rows.mean(0)
        shift = mean - self.mean
        self.spread += (rows - mean).square().sum(0)
        self.spread += shift.square() * count * (self.tokens - count) / self.tokens
        self.mean += shift * count / self.tokens

    def value(self) -> tuple[Tensor, Tensor]:
        """(mean, variance), each (I,) float32."""
        return self.mean.float(), (self.spread / max(self.tokens, 1)).float()


class Hessian(Accumulator):
    """Curvature of the layer's squared reconstruction error: H = (2 / T) sum of x xᵀ."""

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        super().__init__(features, device)
        self.gram = torch.zeros(features, features, device=self.device)

    def _add(self, rows: Tensor) -> None:
        # A running mean keeps the fp32 entries of one size however many tokens pass.
        share = len(rows) / self.tokens
        self.gram.mul_(1.0 - share).addmm_(rows.T, rows, alpha=2.0 / self.tokens)

    def value(self) -> Tensor:
        """(I, I) float32, symmetric, not damped."""
        return self.gram


class Gradient(Accumulator):
    """Mean and mean square of a weight's loss gradient over batches.

    Shown one gradient per batch, (O, I) flattened to ``(1, O * I)``.
    """

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        super().__init__(features, device)
        self.mean = torch.zeros(features, device=self.device)
        self.square = torch.zeros(features, device=self.device)

    def _add(self, rows: Tensor) -> None:
        share = len(rows) / self.tokens
        self.mean.lerp_(rows.mean(0), share)
        self.square.lerp_(rows.square().mean(0), share)

    def value(self) -> tuple[Tensor, Tensor]:
        """(mean gradient, mean squared gradient), each (O * I,) float32."""
        return self.mean, self.square


class QuantileSketch(Accumulator):
    """Quantiles of |x| over all channels and tokens, to 0.1 % of the value.

    A histogram with logarithmic bins of ratio 1.002: counting and adding are exact, so sketches
    of parts add up to the sketch of the whole, on any device, in any order. Values below 1e-12
    count as zero, values above 1e+12 as 1e+12.

    Source: DDSketch, arXiv 1908.10693.
    """

    _LOW, _HIGH = 1e-12, 1e12
    _STEP = math.log(1.002)
    _BINS = int(math.log(_HIGH / _LOW) / _STEP) + 2

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        super().__init__(features, device)
        self.counts = torch.zeros(self._BINS, dtype=torch.int64, device=self.device)

    def _add(self, rows: Tensor) -> None:
        size = rows.abs().flatten().clamp_max(self._HIGH)
        bins = ((size / self._LOW).log() / self._STEP).floor().long() + 1
        bins = torch.where(size < self._LOW, 0, bins.clamp(0, self._BINS - 1))
        self.counts += torch.bincount(bins, minlength=self._BINS)

    def quantile(self, share: float) -> float:
        """A value that at least ``share`` (0 to 1) of the |x| do not exceed, within 0.1 %.

        ``quantile(0)`` is 0, so that a threshold for sparsity 0 removes nothing.
        """
        total = int(self.counts.sum())
        if total == 0:
            raise GossamerError("no tokens were measured; give calibration text")
        if share <= 0.0:
            return 0.0
        cumulative = self.counts.cumsum(0)
        wanted = min(total, max(1, math.ceil(share * total - 1e-9)))
        index = int(torch.searchsorted(cumulative, wanted))
        if index == 0:
            return self._LOW
        return self._LOW * math.exp((index - 0.5) * self._STEP)

    def share_below(self, threshold: float) -> float:
        """Share of |x| at or below a threshold, to the resolution of one bin."""
        if threshold < self._LOW:
            return float(self.counts[0]) / max(1, int(self.counts.sum()))
        index = int(math.log(min(threshold, self._HIGH) / self._LOW) / self._STEP) + 1
        return float(self.counts[: index + 1].sum()) / max(1, int(self.counts.sum()))

    def value(self) -> "QuantileSketch":
        """The sketch itself; ask it for :meth:`quantile`."""
        return self


_ACCUMULATORS: dict[Stat, type[Accumulator]] = {
    Stat.INPUT_L2: InputNorm,
    Stat.INPUT_MOMENTS: InputMoments,
    Stat.INPUT_QUANTILES: QuantileSketch,
    Stat.HESSIAN: Hessian,
    Stat.GRADIENT: Gradient,
}
