"""How hard a search pulls its relaxed masks towards the budget: GradBalance, Lagrange, not at all.

The pull at a step is multiplier times the gradient of the error, in percent of the budget.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.core import unknown

__all__ = ["Balance", "Balancer", "GradBalance", "Lagrange", "Unbalanced", "balancer", "norm"]

Balance = Literal["gradbalance", "lagrange", "none"]

# Below it a norm is taken for nothing.
_TINY = 1e-12


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all entries, scaled by the largest so that no square leaves the range."""
    top = torch.stack([t.abs().amax() for t in tensors]).amax().clamp(min=torch.finfo().tiny)
    return top * torch.stack([(t / top).square().sum() for t in tensors]).sum().sqrt()


class Unbalanced:
    """No pull: the masks are free, and the budget is met by the last selection alone."""

    relaxed = 1.0
    """The budget's multiple that the search may expect to keep."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def pull(self, task: Sequence[Tensor], budget: Sequence[Tensor], error: Tensor) -> Tensor:
        """The multiplier of this step.

        Parameters
        ----------
        task, budget : gradients of the objective and of the error.
        error : 100 (kept / allowed - 1); below 0 while under the budget.
        """
        self.value = torch.zeros_like(error)
        return self.value

    def scale(self, factor: float) -> None:
        """The learning rate was multiplied."""


Balancer = Unbalanced


class GradBalance(Unbalanced):
    """The pull is as long as the objective's gradient over the budget, and fades under it.

    λ* = ‖task‖ / ‖budget‖ at or over the budget, else 0; λ ← 0.99 λ + 0.01 λ*, the first λ* taken
    as it is. A search begins under its relaxed budget, so the first λ* is 0.

    Source: arXiv 2512.07142, GradBalance.
    """

    relaxed = 1.1

    def pull(self, task: Sequence[Tensor], budget: Sequence[Tensor], error: Tensor) -> Tensor:
        """The multiplier of this step."""
        over = norm(task) / norm(budget).clamp(min=_TINY)
        wanted = torch.where(error >= 0, over, torch.zeros_like(over))
        self.value = wanted if self.value is None else 0.99 * self.value + 0.01 * wanted
        return self.value


class Lagrange(Unbalanced):
    """The multiplier climbs by rate times the error, from 0.

    Parameters
    ----------
    rate : a hundredth of the masks' learning rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def pull(self, task: Sequence[Tensor], budget: Sequence[Tensor], error: Tensor) -> Tensor:
        """The multiplier of this step; the next one has climbed."""
        now = torch.zeros_like(error) if self.value is None else self.value
        self.value = now + self.rate * error
        return now

    def scale(self, factor: float) -> None:
        self.rate *= factor


def balancer(name: Balance, lr: float) -> Balancer:
    """A new one by name.

    Raises
    ------
    GossamerError
        For an unknown name.
    """
    if name == "gradbalance":
        return GradBalance()
    if name == "lagrange":
        return Lagrange(1e-2 * lr)
    if name == "none":
        return Unbalanced()
    raise unknown("balance", name, get_args(Balance))
