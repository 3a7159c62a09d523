"""A mean-field Gaussian over the active weights of one matrix; all others are exactly zero.

Shapes: P = weights of the matrix, K = active ones. Nothing but a gradient at changes has P entries.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import softplus

from gossamer.core import kept_count, topk_mask
from gossamer.methods.training.bayesian.criteria import CRITERIA, Criterion

__all__ = ["Posterior", "inverse_softplus"]

_MU_SCALE, _SIGMA = 0.1, 6e-4  # at the start
_FLOOR = 1e-8  # of sigma, which rounding must not make 0


def inverse_softplus(value: Tensor) -> Tensor:
    """rho with softplus(rho) = value, value > 0."""
    return value + torch.log(-torch.expm1(-value))


@dataclass
class Posterior:
    """N(mu, softplus(rho)^2) for every active weight.

    Parameters
    ----------
    shape : of the matrix. places : int64, (K,), ascending row-major positions.
    mu, rho, mu_velocity, rho_velocity : (K,).
    """

    shape: tuple[int, ...]
    places: Tensor
    mu: Tensor
    rho: Tensor
    mu_velocity: Tensor
    rho_velocity: Tensor

    @classmethod
    def at(cls, shape: tuple[int, ...], places: Tensor, mu: Tensor, rho: Tensor) -> "Posterior":
        """From places, means and scales, without momentum."""
        return cls(shape, places, mu, rho, torch.zeros_like(mu), torch.zeros_like(rho))

    @classmethod
    def random(cls, shape: tuple[int, ...], sparsity: float, generator: Generator) -> "Posterior":
        """Random places, means from N(0, 0.1^2), sigma 6e-4."""
        size = int(torch.Size(shape).numel())
        kept = kept_count(size, sparsity)
        places = torch.randperm(size, generator=generator)[:kept].sort().values
        mu = _MU_SCALE * torch.randn(kept, generator=generator)
        rho = inverse_softplus(torch.full((kept,), _SIGMA, dtype=torch.float64)).float()
        return cls.at(shape, places, mu, rho)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def size(self) -> int:
        """P."""
        return int(torch.Size(self.shape).numel())

    def sigma(self, rho: Tensor | None = None) -> Tensor:
        """(K,), at least 1e-8."""
        return softplus(self.rho if rho is None else rho).clamp_min(_FLOOR)

    def dense(self, values: Tensor) -> Tensor:
        """Values of the active weights as a matrix; differentiable."""
        return values.new_zeros(self.size).index_put((self.places,), values).view(self.shape)

    def sample(self, generator: Generator) -> Tensor:
        """One matrix drawn from the posterior."""
        noise = torch.randn(len(self), generator=generator)
        return self.dense(self.mu + self.sigma() * noise)

    def divergence(self, mu: Tensor, rho: Tensor, prior: float) -> Tensor:
        """KL to N(0, prior^2), summed over the active weights, differentiable in mu and rho."""
        sigma = self.sigma(rho)
        terms = (prior / sigma).log() + (sigma.square() + mu.square()) / (2 * prior**2) - 0.5
        return terms.sum()

    def exchange(self, share: float, criterion: Criterion, gradient: Tensor) -> int:
        """Replace the active weights of least worth by those of the largest gradient.

        Parameters
        ----------
        share : of the active weights, rounded to a count; at most as many as are inactive.
        gradient : of the loss by the matrix, its shape.

        Returns
        -------
        The count. New weights have mu 0, the mean sigma of those that stay, and no momentum. Those
        just removed take no part: they would come back at once.
        """
        count = min(round(share * len(self)), self.size - len(self), len(self) - 1)
        if count < 1:
            return 0
        worth = CRITERIA[criterion](self.mu, self.sigma())
        keep = topk_mask(worth[None], len(self) - count)[0]
        score = gradient.reshape(-1).abs().clone()
        score[self.places] = -1.0
        added = topk_mask(score[None], count)[0].nonzero()[:, 0]
        level = inverse_softplus(self.sigma()[keep].double().mean()).to(self.rho)
        order = torch.argsort(torch.cat([self.places[keep], added]))

        def merged(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old[keep], new])[order]

        zero = self.mu.new_zeros(count)
        self.mu, self.rho = merged(self.mu, zero), merged(self.rho, level.expand(count))
        self.mu_velocity = merged(self.mu_velocity, zero)
        self.rho_velocity = merged(self.rho_velocity, zero)
        self.places = merged(self.places, added)
        return count
