"""The search: draw masks, measure the loss of the untrained network under each, keep the best."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.optim import SGD

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.change import StartLoss
from gossamer.models.fit import undisturbed

__all__ = ["Found", "best_of"]

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Parameters
    ----------
    losses : of the network under every draw. best : which draw has the lowest, the first of ties.
    """

    losses: tuple[float, ...]

    @property
    def best(self) -> int:
        return min(range(len(self.losses)), key=self.losses.__getitem__)

    @property
    def loss(self) -> float:
        """The lowest loss."""
        return self.losses[self.best]

    @property
    def mean(self) -> float:
        """The mean loss of all draws: what one random mask has on average."""
        return sum(self.losses) / len(self.losses)


def best_of(
    draws: int,
    masks: Callable[[int], Masks],
    model: nn.Module,
    loss: StartLoss,
    *,
    trial_steps: int = 0,
    lr: float = 0.1,
) -> Found:
    """Measure the loss of a network under every draw of masks; the network stays as it was.

    Parameters
    ----------
    masks : number of a draw to the masks by parameter.
    loss : of the network on a sample. The network is in evaluation mode, without dropout.
    trial_steps : updates of plain gradient descent on that sample before the loss counts.
    lr : of these updates.

    Raises
    ------
    GossamerError
        If a loss is no number.
    """
    losses: list[float] = []
    held = [*model.parameters(), *model.buffers()]
    before = [t.detach().clone() for t in held]
    with undisturbed(model):
        model.eval()
        for number in range(draws):
            try:
                losses.append(_loss_under(masks(number), model, loss, trial_steps, lr))
            finally:
                with torch.no_grad():
                    for tensor, value in zip(held, before, strict=True):
                        tensor.copy_(value)
            if not isfinite(losses[-1]):
                raise GossamerError(
                    f"the loss is {losses[-1]} under draw {number + 1} of {draws}; "
                    "lower trial_lr or give a sample with a finite loss"
                )
    return Found(tuple(losses))


def _loss_under(masks: Masks, model: nn.Module, loss: StartLoss, steps: int, lr: float) -> float:
    held = {path: model.get_parameter(path) for path in masks}

    def remove() -> None:
        with torch.no_grad():
            for path, weight in held.items():
                weight.mul_(masks[path])

    remove()
    # As long as the trial lasts only, so that nothing of it is left.
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(model).backward()
        optimizer.step()
        remove()
    with torch.no_grad():
        return float(loss(model))
