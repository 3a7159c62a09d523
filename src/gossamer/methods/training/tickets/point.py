"""A point of a training to go back to: weights, optimizer, learning-rate schedule, random state."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.trained import copy_of, put_back

__all__ = ["Point"]


@dataclass
class Point:
    """What a training was after some update.

    A training that goes on from here with the batches that came next repeats itself to the bit.

    Parameters
    ----------
    weights : parameters and buffers by name. masters : copies in higher precision that train.
    random : torch's random state, of main memory and, where the model lies there, of its GPU.
    optimizer, scheduler : their state dicts, taken just before the next update, when whatever sets
        the learning rate has done so; empty until then.
    """

    weights: dict[str, Tensor]
    masters: dict[str, Tensor]
    random: dict[str, Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, masters: Mapping[str, Tensor]) -> "Point":
        """The present point, without the optimizer."""
        random = {"cpu": torch.get_rng_state()}
        device = next(model.parameters()).device
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        copies = {name: tensor.detach().clone() for name, tensor in masters.items()}
        return cls(copy_of(model), copies, random)

    def complete(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Add the optimizer and the schedule as they are before the next update."""
        self.optimizer = deepcopy(optimizer.state_dict())
        if scheduler is not None:
            self.scheduler = deepcopy(scheduler.state_dict())

    def check(self, model: nn.Module) -> None:
        """Refuse a model of other shapes.

        Raises
        ------
        GossamerError
            Naming the first tensor that differs.
        """
        now = {name: tuple(t.shape) for name, t in (*_named(model),)}
        for name in sorted(now.keys() | self.weights.keys()):
            then = self.weights.get(name)
            if then is None or now.get(name) != tuple(then.shape):
                raise GossamerError(
                    f"{name} of the model is {now.get(name, 'missing')}, in the rounds so far "
                    f"{'missing' if then is None else tuple(then.shape)}; go on with the model "
                    "they were begun with"
                )

    @torch.no_grad()
    def rewind(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        masters: Mapping[str, Tensor],
    ) -> None:
        """Make everything what it was, in place; gradients are dropped.

        Raises
        ------
        GossamerError
            If the model or the optimizer is another one.
        """
        self.check(model)
        if set(masters) != set(self.masters):
            odd = ", ".join(sorted(set(masters) ^ set(self.masters))[:3])
            raise GossamerError(f"masters differ from the first round's: {odd}")
        try:
            # Optimizers take the tensors of a state they load for their own, and change them.
            optimizer.load_state_dict(deepcopy(self.optimizer))
        except ValueError as error:
            raise GossamerError(
                f"the optimizer is not the first round's ({error}); make it alike in every round"
            ) from None
        if scheduler is not None:
            scheduler.load_state_dict(deepcopy(self.scheduler))
        put_back(model, self.weights)
        for name, tensor in masters.items():
            tensor.copy_(self.masters[name])
        for tensor in (*model.parameters(), *masters.values()):
            tensor.grad = None
        torch.set_rng_state(self.random["cpu"])
        device = next(model.parameters()).device
        if device.type == "cuda" and "cuda" in self.random:
            torch.cuda.set_rng_state(self.random["cuda"], device)

    def size(self) -> int:
        """Bytes held."""
        moments = [
            value
            for state in self.optimizer.get("state", {}).values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        held = (*self.weights.values(), *self.masters.values(), *moments)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
