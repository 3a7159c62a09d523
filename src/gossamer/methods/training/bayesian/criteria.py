"""What a Gaussian weight is worth keeping for: closed forms of its mean and standard deviation.

All take mu and sigma of one shape, sigma > 0, and compute in float64. Higher means keep.
"""

from collections.abc import Callable
from math import pi, sqrt
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "CRITERIA",
    "Criterion",
    "absolute_mean",
    "absolute_snr",
    "exponential_mean",
    "exponential_snr",
    "mean_size",
    "snr",
]

Criterion = Literal["mean", "snr", "abs_mean", "abs_snr", "exp_mean", "exp_snr"]
_LAMBDA = 1.0


def mean_size(mu: Tensor, sigma: Tensor) -> Tensor:
    """|mu|."""
    return mu.double().abs()


def snr(mu: Tensor, sigma: Tensor) -> Tensor:
    """|mu| / sigma."""
    return mu.double().abs() / sigma.double()


def _excess(z: Tensor) -> Tensor:
    """(E|theta| - |mu|) / sigma for z = |mu| / sigma: without cancellation for large z."""
    return sqrt(2 / pi) * torch.exp(-0.5 * z * z) - z * torch.erfc(z / sqrt(2))


def absolute_mean(mu: Tensor, sigma: Tensor) -> Tensor:
    """E|theta| = mu erf(mu / (sigma sqrt 2)) + sigma sqrt(2 / pi) exp(-mu^2 / (2 sigma^2))."""
    size, wide = mu.double().abs(), sigma.double()
    return size + wide * _excess(size / wide)


def absolute_snr(mu: Tensor, sigma: Tensor) -> Tensor:
    """E|theta| / sqrt(Var|theta|), with Var|theta| = mu^2 + sigma^2 - (E|theta|)^2.

    A rising function of |mu| / sigma alone: it ranks weights as :func:`snr` does.
    """
    z = mu.double().abs() / sigma.double()
    excess = _excess(z)
    return (z + excess) / (1.0 - 2.0 * z * excess - excess * excess).sqrt()


def _log_mean(mu: Tensor, sigma: Tensor, lam: float) -> Tensor:
    """log E exp(lam |theta|)."""
    size, wide = mu.double().abs(), sigma.double()
    z, shift = size / wide, lam * wide
    up = lam * size + torch.special.log_ndtr(z + shift)
    down = -lam * size + torch.special.log_ndtr(shift - z)
    return 0.5 * shift * shift + torch.logaddexp(up, down)


def exponential_mean(mu: Tensor, sigma: Tensor, lam: float = _LAMBDA) -> Tensor:
    """E exp(lam |theta|)."""
    return _log_mean(mu, sigma, lam).exp()


def exponential_snr(mu: Tensor, sigma: Tensor, lam: float = _LAMBDA) -> Tensor:
    """E exp(lam |theta|) over its standard deviation."""
    spread = torch.expm1(_log_mean(mu, sigma, 2 * lam) - 2 * _log_mean(mu, sigma, lam))
    return spread.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()


CRITERIA: dict[Criterion, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean_size,
    "snr": snr,
    "abs_mean": absolute_mean,
    "abs_snr": absolute_snr,
    "exp_mean": exponential_mean,
    "exp_snr": exponential_snr,
}
