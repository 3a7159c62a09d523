"""Masks that move while a network trains: drop small weights, grow where the gradient is large.

RigL's update for the masks of this sub-package; the family of methods that train sparse networks
shares its drop and its growth (:mod:`gossamer.core.exchange`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gossamer.core import Budget, Unstructured
from gossamer.core.exchange import grow, survivors
from gossamer.core.schedule import Cosine
from gossamer.methods.weights.structured.masked import MaskedModule, masked_modules

__all__ = ["MaskUpdater"]


class MaskUpdater:
    """Moves a share of every mask's weights, every so many steps, until training settles.

    Call ``begin`` before the forward pass and ``step`` after the backward pass::

        updater.begin(i)
        loss(model).backward()
        if not updater.step():
            optimizer.step()
        optimizer.zero_grad()

    Parameters
    ----------
    model : holds masked modules. optimizer : its state of dropped and grown weights is cleared.
    total : training steps; masks move until three quarters of them.
    drop : share of the kept weights exchanged at first, falling to 0 as half a cosine.
    every : steps between updates.

    Source: arXiv 1911.11134, algorithm 1: a step that moves masks changes no weight; grown weights
    start at zero and dropped ones may grow again at once.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total: int,
        drop: float = 0.3,
        every: int = 100,
    ) -> None:
        self.modules: list[MaskedModule] = masked_modules(model)
        self.optimizer = optimizer
        end = max(1, int(0.75 * total))
        self.schedule = Cosine(initial=drop, final=0.0, start=0, end=end, every=every)
        self._share = 0.0
        self._due = False

    def begin(self, step: int) -> bool:
        """Say which step comes; True if masks will move in it."""
        at = self.schedule.at(step)
        self._share = at.sparsity
        self._due = at.update and step > 0 and at.sparsity > 0.0
        for module in self.modules:
            module.dense_gradient = self._due
        return self._due

    @torch.no_grad()
    def step(self) -> bool:
        """Move the masks if it is time; True if so, and the optimizer's step is then left out."""
        if not self._due:
            return False
        for module in self.modules:
            module.dense_gradient = False
            for weight, mask in module.pairs():
                assert weight.grad is not None
                self._move(weight, mask, weight.grad)
        self._due = False
        return True

    def _move(self, weight: nn.Parameter, mask: Tensor, gradient: Tensor) -> None:
        rule, flat = Unstructured("layer"), _matrix(mask)
        left = survivors(_matrix(weight), flat, self._share, rule)
        grown = grow(left, _matrix(gradient).abs(), rule, Budget(keep=int(flat.sum())))
        fresh = (grown & ~left).view(mask.shape)
        mask.copy_(grown.view(mask.shape))
        # A dropped weight that grows again starts from zero like the others.
        changed = ~mask | fresh
        weight.masked_fill_(changed, 0)
        for value in self._moments(weight):
            value.masked_fill_(changed, 0)

    def _moments(self, weight: nn.Parameter) -> Iterator[Tensor]:
        for value in self.optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                yield value


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(tensor.shape[0], -1)
