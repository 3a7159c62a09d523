"""Track: when, over the checkpoints of a training, weights suddenly became small.

Source: arXiv 2306.03805 ("abrupt sparsification").
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.weights.base import prunable

__all__ = ["Jump", "abrupt_sparsification", "largest_jump", "small_fraction"]

Checkpoint = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Jump:
    """The largest rise of the share of small weights between two neighbouring checkpoints.

    Parameters
    ----------
    fractions : share of small weights at every checkpoint, 0 to 1.
    index : the rise lies between checkpoints ``index`` and ``index + 1``.
    height : by how much the share rises there; negative if it falls everywhere.
    typical : median size of the changes between the other neighbours, 0 without others.
    """

    fractions: tuple[float, ...]
    index: int
    height: float
    typical: float

    def __str__(self) -> str:
        return (
            f"largest jump {self.height:+.2%} of the weights, between checkpoints {self.index} and "
            f"{self.index + 1} ({self.fractions[self.index]:.2%} to "
            f"{self.fractions[self.index + 1]:.2%}); a typical change is {self.typical:.2%}"
        )


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    if isinstance(checkpoint, nn.Module):
        return {site.name: site.weight(checkpoint) for site in prunable(checkpoint).sites}
    return {name: t for name, t in checkpoint.items() if t.is_floating_point() and t.dim() > 1}


@torch.no_grad()
def small_fraction(checkpoint: Checkpoint, tau: float = 0.01, *, relative: bool = True) -> float:
    """Share of a network's weights with |w| < tau.

    Parameters
    ----------
    checkpoint : a model, whose prunable matrices count; or name to tensor, where every tensor of
        two or more dimensions counts.
    tau : the bound, above 0. relative : as a share of the standard deviation of the weight's own
        matrix, so that a training that only rescales a layer changes nothing.

    Raises
    ------
    GossamerError
        If tau is not above 0, or there is no matrix.
    """
    if not isinstance(tau, int | float) or not isfinite(tau) or tau <= 0:
        raise GossamerError(f"tau is {tau!r}; give a bound above 0")
    weights = _weights(checkpoint)
    if not weights:
        raise GossamerError("the checkpoint holds no matrix; give a model or its state dict")
    small = total = 0
    for weight in weights.values():
        bound = tau * float(weight.double().std(correction=0)) if relative else tau
        small += int((weight.abs().double() < bound).sum())
        total += weight.numel()
    return small / total


def largest_jump(fractions: Sequence[float]) -> Jump:
    """The largest rise between neighbours; among equal ones the first.

    Raises
    ------
    GossamerError
        On fewer than two checkpoints.
    """
    values = tuple(float(f) for f in fractions)
    if len(values) < 2:
        raise GossamerError(f"{len(values)} checkpoint has no interval; give at least two")
    rises = [after - before for before, after in pairwise(values)]
    index = max(range(len(rises)), key=lambda i: (rises[i], -i))
    others = torch.tensor([abs(r) for i, r in enumerate(rises) if i != index], dtype=torch.float64)
    return Jump(values, index, rises[index], float(others.median()) if len(others) else 0.0)


def abrupt_sparsification(
    checkpoints: Iterable[Checkpoint], tau: float = 0.01, *, relative: bool = True
) -> Jump:
    """Follow the share of small weights over checkpoints and find its largest jump.

    Parameters
    ----------
    checkpoints : models or state dicts in the order of training; read one at a time, so a
        generator that loads them needs the memory of one.
    tau, relative : see :func:`small_fraction`.
    """
    return largest_jump([small_fraction(c, tau, relative=relative) for c in checkpoints])
