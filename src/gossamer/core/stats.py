"""Stat: what must be measured on data before a method can decide.

Accumulators take one batch of activations at a time and keep fp32 or fp64 sums, so a value
does not depend on how the tokens were split into batches (beyond rounding), and accumulators
of two parts merge into that of the whole. Shapes: T = valid tokens, I = in features.
"""

from abc import ABC, abstractmethod
from enum import Enum
from math import ceil
from typing import Any, Self

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

__all__ = [
    "Accumulator",
    "Gradient",
    "Hessian",
    "InputMoments",
    "InputNorm",
    "QuantileSketch",
    "Stat",
]


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
    """A running statistic of the rows it is shown.

    Parameters
    ----------
    features : channels of a row. device : where the state is held, that of the rows.

    Attributes
    ----------
    tokens : rows taken in so far.
    """

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
        # The sum is one cheap pass; only when it is odd does every entry get looked at.
        if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():
            raise GossamerError(
                "calibration activations hold NaN or infinity; load the model in float32"
            )
        self.tokens += len(rows)
        self._add(rows)

    def merge(self, other: "Accumulator") -> None:
        """Take in what another accumulator of the same kind and width has seen.

        Raises
        ------
        GossamerError
            If kind or width differ.
        """
        if not isinstance(other, type(self)) or other.features != self.features:
            raise GossamerError(
                f"{type(self).__name__} over {self.features} channels cannot take in "
                f"{type(other).__name__} over {other.features}"
            )
        if not other.tokens:
            return
        self.tokens += other.tokens
        self._merge(other)

    @abstractmethod
    def value(self) -> Any:
        """The statistic of all rows so far."""

    @abstractmethod
    def _add(self, rows: Tensor) -> None:
        """Take in finite float32 rows, at least one; ``tokens`` already counts them."""

    @abstractmethod
    def _merge(self, other: Any) -> None:
        """Take in the state of another of the same class; ``tokens`` already counts its rows."""

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
        self.squares += rows.square().sum(0)

    def _merge(self, other: Self) -> None:
        self.squares += other.squares

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
        variance, mean = torch.var_mean(rows, dim=0, correction=0)
        self._combine(len(rows), mean.double(), variance.double() * len(rows))

    def _merge(self, other: Self) -> None:
        self._combine(other.tokens, other.mean, other.spread)

    def _combine(self, count: int, mean: Tensor, spread: Tensor) -> None:
        # Chan's update of mean and sum of squared deviations: stable where E[x²] - E[x]² cancels.
        shift = mean - self.mean
        self.spread += spread + shift.square() * (count * (self.tokens - count) / self.tokens)
        self.mean += shift * (count / self.tokens)

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

    def _merge(self, other: Self) -> None:
        self.gram.lerp_(other.gram, other.tokens / self.tokens)

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

    def _merge(self, other: Self) -> None:
        share = other.tokens / self.tokens
        self.mean.lerp_(other.mean, share)
        self.square.lerp_(other.square, share)

    def value(self) -> tuple[Tensor, Tensor]:
        """(mean gradient, mean squared gradient), each (O * I,) float32."""
        return self.mean, self.square


class QuantileSketch(Accumulator):
    """Quantiles of |x| over all channels and tokens, to 0.1 % of the value.

    A histogram whose bins are the leading bits of a float32: 512 bins of equal width between a
    power of two and the next. Counting and adding are exact, so sketches of parts add up to the
    sketch of the whole, on any device, in any order. Values below 2**-40 (about 1e-12) count
    as zero, values from 2**40 on share the last bin.

    Source: a logarithmic sketch after DDSketch, arXiv 1908.10693.
    """

    _LOWEST, _HIGHEST = -40, 40  # exponents of two
    _DROPPED = 14  # of the 23 bits of the mantissa: what is left tells 512 bins apart
    _FIRST = (127 + _LOWEST) << (23 - _DROPPED)  # leading bits of 2**_LOWEST
    _BINS = ((_HIGHEST - _LOWEST) << (23 - _DROPPED)) + 2  # zero below, the rest above
    _CHUNK = 1 << 20  # entries binned at once, so that intermediates stay in cache

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        super().__init__(features, device)
        self.counts = torch.zeros(self._BINS, dtype=torch.int64, device=self.device)

    def _add(self, rows: Tensor) -> None:
        for part in torch.split(rows.reshape(-1).view(torch.int32), self._CHUNK):
            bits = part & 0x7FFFFFFF
            bits >>= self._DROPPED
            bits -= self._FIRST - 1
            self.counts += torch.bincount(bits.clamp_(0, self._BINS - 1), minlength=self._BINS)

    def _merge(self, other: Self) -> None:
        self.counts += other.counts

    def _edge(self, index: float) -> float:
        """Where a bin begins; with half an index added, its middle."""
        exponent, step = divmod(index - 1, 512)
        return 2.0 ** (self._LOWEST + exponent) * (1.0 + step / 512)

    def quantile(self, share: float) -> float:
        """A value that at least ``share`` (0 to 1) of the |x| do not exceed, within 0.1 %.

        ``quantile(0)`` is 0, so that a threshold for sparsity 0 removes nothing.

        Raises
        ------
        GossamerError
            If nothing was measured.
        """
        total = int(self.counts.sum())
        if total == 0:
            raise GossamerError("no tokens were measured; give calibration text")
        if share <= 0.0:
            return 0.0
        # Without the slack, 0.3 * 10 would ask for a fourth entry.
        wanted = min(total, max(1, ceil(share * total * (1 - 1e-12))))
        index = int(torch.searchsorted(self.counts.cumsum(0), wanted))
        return self._edge(1) if index == 0 else self._edge(index + 0.5)

    def share_below(self, threshold: float) -> float:
        """Share of |x| at or below a threshold, to the resolution of one bin."""
        bits = torch.tensor([abs(threshold)], dtype=torch.float32).view(torch.int32)
        index = int((bits >> self._DROPPED) - (self._FIRST - 1))
        count = int(self.counts[: max(0, min(index, self._BINS - 1)) + 1].sum())
        return count / max(1, int(self.counts.sum()))

    def value(self) -> Self:
        """The sketch itself; ask it for :meth:`quantile`."""
        return self


_ACCUMULATORS: dict[Stat, type[Accumulator]] = {
    Stat.INPUT_L2: InputNorm,
    Stat.INPUT_MOMENTS: InputMoments,
    Stat.INPUT_QUANTILES: QuantileSketch,
    Stat.HESSIAN: Hessian,
    Stat.GRADIENT: Gradient,
}
