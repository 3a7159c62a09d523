"""Correlations of units, kept batch by batch without ever holding a batch.

Shapes: N samples (tokens count as samples), I units before a layer, O units behind it.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.methods.training.sparsifier.masks import world

__all__ = ["Comoments"]

# Below this share of its mean, a unit's deviation is rounding: it is counted as silent.
_ROUNDING = 1e-5


class Comoments:
    """Exponentially weighted means, variances and covariances of pairs of units, in float32.

    Batches are centred on their own means before they are multiplied, so units that are far from
    zero lose nothing to rounding.

    Parameters
    ----------
    shape : (O, I).
    decay : weight of what was known when a batch is added; the first batch counts in full.
    """

    def __init__(self, shape: tuple[int, int], decay: float, device: torch.device) -> None:
        self.decay = decay
        self.batches = 0
        behind, before = shape
        self.tensors = {
            "mean_before": torch.zeros(before, device=device),
            "mean_behind": torch.zeros(behind, device=device),
            "variance_before": torch.zeros(before, device=device),
            "variance_behind": torch.zeros(behind, device=device),
            "covariance": torch.zeros(shape, device=device),
        }

    @torch.no_grad()
    def update(self, before: Tensor, behind: Tensor) -> None:
        """Add a batch. One that is empty, or holds NaN or infinity, is left out.

        Parameters
        ----------
        before : (N, I). behind : (N, O).
        """
        if not len(before):
            return
        sides = {"before": before.float(), "behind": behind.float()}
        means = {name: side.mean(0) for name, side in sides.items()}
        if not all(bool(mean.isfinite().all()) for mean in means.values()):
            return
        centred = {name: side - means[name] for name, side in sides.items()}
        share = 1.0 - self.decay if self.batches else 1.0
        # Moments of a mixture: within its parts, and between their means.
        off = {name: mean - self.tensors[f"mean_{name}"] for name, mean in means.items()}
        within = {
            "variance_before": centred["before"].square().mean(0),
            "variance_behind": centred["behind"].square().mean(0),
            "covariance": centred["behind"].T @ centred["before"] / len(before),
        }
        for name, between in _between(off).items():
            old = self.tensors[name].add_(between, alpha=share)
            old.mul_(1.0 - share).add_(within[name], alpha=share)
        for name, step in off.items():
            self.tensors[f"mean_{name}"].add_(step, alpha=share)
        self.batches += 1

    def correlation(self) -> Tensor:
        """(O, I) Pearson correlations; 0 where either unit is constant, or nothing was added."""
        scales: list[Tensor] = []
        for side in ("behind", "before"):
            variance, mean = self.tensors[f"variance_{side}"], self.tensors[f"mean_{side}"]
            silent = variance.sqrt() <= _ROUNDING * mean.abs()
            scales.append(torch.where(silent, 0.0, variance.clamp_min(1e-38).rsqrt()))
        found = scales[0][:, None] * self.tensors["covariance"] * scales[1]
        return found.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)

    def pool(self) -> None:
        """Take in what all processes have seen; those that have seen anything count alike."""
        if world() == 1:
            return
        seen = torch.tensor(float(self.batches > 0), device=self.tensors["covariance"].device)
        share = float(seen) / float(_summed(seen).clamp_min(1.0))
        off: dict[str, Tensor] = {}
        for side in ("before", "behind"):
            mean = self.tensors[f"mean_{side}"]
            common = _summed(mean * share)
            off[side] = mean - common
            mean.copy_(common)
        for name, between in _between(off).items():
            self.tensors[name].copy_(_summed((self.tensors[name] + between) * share))


def _between(off: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Second moments of a difference of means."""
    return {
        "variance_before": off["before"].square(),
        "variance_behind": off["behind"].square(),
        "covariance": off["behind"][:, None] * off["before"],
    }


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total
