"""Densities: how a unit's values are distributed under each concept, and how far apart they are.

A sparse unit is exactly zero most of the time. That zero is an outcome with a probability of its
own, never a bin's edge.
Shapes: R = rows, K = units, C = concepts, B = bins.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gossamer.core import GossamerError, check_count
from gossamer.methods.features.editing.laws import Posterior, Within

__all__ = ["Densities", "separability"]

BINS = 16
# Half a row a concept, spread over all outcomes: what was never seen is rare, not impossible.
_PRIOR_ROWS = 0.5


@dataclass(frozen=True, eq=False)
class Densities:
    """Histograms of units' values given a concept.

    Parameters
    ----------
    low, width : (K,), where the bins begin and how wide one is.
    counts : (K, C, B + 1), rows whose value is exactly 0, then those in each bin.
    mean, deviation : (K, C), of the values that are not 0; 0 where there are none.
    """

    low: Tensor
    width: Tensor
    counts: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, values: Tensor, labels: Tensor, bins: int = BINS) -> Self:
        """Count (R, K) values by the concept (R,) of their row.

        Raises
        ------
        GossamerError
            If a concept between the first and the last has no row, or there is only one.
        """
        check_count("bins", bins, 1)
        rows = torch.bincount(labels)
        if len(rows) < 2 or not bool((rows > 0).all()):
            raise GossamerError(
                f"rows of each concept: {rows.tolist()}; densities need two concepts or more, "
                "all with rows"
            )
        values = values.float()
        fired = values != 0
        low = torch.where(fired, values, torch.inf).amin(0)
        high = torch.where(fired, values, -torch.inf).amax(0)
        low = torch.where(low.isfinite(), low, 0.0)
        width = torch.where(high > low, (high - low) / bins, 1.0)
        place = ((values - low) / width).floor().clamp(0, bins - 1).long() + 1
        place = torch.where(fired, place, 0)
        units, concepts = values.shape[1], len(rows)
        cell = labels[:, None] * (bins + 1) + place
        cell = cell + torch.arange(units, device=cell.device) * (concepts * (bins + 1))
        counts = torch.bincount(cell.flatten(), minlength=units * concepts * (bins + 1))
        hot = torch.nn.functional.one_hot(labels, concepts).float()
        many = (hot.T @ fired.float()).T
        mean = (hot.T @ values).T / many.clamp_min(1)
        square = (hot.T @ values.square()).T / many.clamp_min(1)
        return cls(
            low,
            width,
            counts.view(units, concepts, bins + 1).float(),
            mean,
            (square - mean.square()).clamp_min(0).sqrt(),
        )

    def given(self) -> Tensor:
        """(K, C, B + 1): P(outcome | concept)."""
        return self.counts / self.counts.sum(2, keepdim=True)

    def divergence(self) -> Tensor:
        """(K,): Jensen-Shannon divergence of the concepts, each of equal weight, 0 to 1.

        H(mean of the distributions) - mean of their entropies, logarithms to the base C.
        """
        chances = self.given().double()
        base = torch.tensor(chances.shape[1], dtype=torch.float64).log()
        return ((_entropy(chances.mean(1)) - _entropy(chances).mean(1)) / base).clamp(0, 1)

    def chance(self, concept: int) -> Tensor:
        """(K, B + 1): P(concept | outcome), concepts weighing as they do among the rows."""
        prior = self.counts.sum(2, keepdim=True)
        prior = prior / prior.sum(1, keepdim=True)
        smooth = self.counts + _PRIOR_ROWS * prior
        return smooth[:, concept] / smooth.sum(1)

    def posterior(self, concept: int, units: Tensor) -> Posterior:
        """Silence units as far as their value speaks for a concept (APP)."""
        return Posterior(self.low[units], self.width[units], self.chance(concept)[units])

    def within(self, concept: int, units: Tensor, tau: float = 2.5) -> Within:
        """Silence units at values within tau deviations of a concept's mean."""
        mean, spread = self.mean[units, concept], tau * self.deviation[units, concept]
        return Within(mean - spread, mean + spread)


def _entropy(chances: Tensor) -> Tensor:
    return -torch.special.xlogy(chances, chances).sum(-1)


def separability(
    values: Tensor, labels: Tensor, *, bins: int = BINS, permutations: int = 4, seed: int = 0
) -> Tensor:
    """How far a unit's values tell concepts apart, 0 not at all, 1 entirely: (K,).

    The square root of the Jensen-Shannon divergence, less what labels in random order give:
    few rows make any histograms differ.

    Parameters
    ----------
    values : (R, K). labels : int64 (R,). permutations : of the labels; 0 subtracts nothing.

    Source: arXiv 2508.15094.
    """
    found = Densities.of(values, labels, bins).divergence()
    generator = torch.Generator().manual_seed(seed)
    chance = torch.zeros_like(found)
    for _ in range(permutations):
        mixed = labels[torch.randperm(len(labels), generator=generator).to(labels.device)]
        chance += Densities.of(values, mixed, bins).divergence() / permutations
    return (found - chance).clamp_min(0).sqrt()
