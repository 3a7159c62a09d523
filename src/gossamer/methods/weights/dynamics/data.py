"""Trajectories: what a world did, as data to learn its dynamics from.

Shapes: N trajectories of T steps; S state and A action components.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["Trajectories", "as_trajectories"]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """States and the actions taken between them.

    Parameters
    ----------
    states : (N, T + 1, S), finite. actions : (N, T, A), finite.

    Raises
    ------
    GossamerError
        If the shapes do not fit together or a value is not finite.
    """

    states: Tensor
    actions: Tensor

    def __post_init__(self) -> None:
        states, actions = self.states, self.actions
        fits = (
            states.dim() == actions.dim() == 3
            and states.shape[0] == actions.shape[0] > 0
            and states.shape[1] == actions.shape[1] + 1 > 1
        )
        if not fits:
            raise GossamerError(
                "trajectories are states (N, T + 1, S) and actions (N, T, A); got "
                f"{tuple(states.shape)} and {tuple(actions.shape)}"
            )
        if not bool(states.isfinite().all()) or not bool(actions.isfinite().all()):
            raise GossamerError("trajectories hold NaN or infinity; leave those out")

    @classmethod
    def from_transitions(cls, states: Tensor, actions: Tensor, after: Tensor) -> "Trajectories":
        """From single steps: states (N, S), actions (N, A), states after them (N, S)."""
        return cls(torch.stack([states, after], 1), actions[:, None])

    def __len__(self) -> int:
        return len(self.states)

    def rows(self, rows: Tensor) -> "Trajectories":
        """Some of the trajectories."""
        return Trajectories(self.states[rows], self.actions[rows])

    def scale(self) -> Tensor:
        """(S,) root mean square change of every state component in a step; 1 where none changes."""
        change = self.states.diff(dim=1).flatten(0, 1).square().mean(0).sqrt()
        return torch.where(change > 1e-8, change, torch.ones_like(change))


def as_trajectories(data: Any) -> Trajectories:
    """What a user gives as data.

    Parameters
    ----------
    data : :class:`Trajectories`, or (states, actions) tensors.

    Raises
    ------
    GossamerError
        For anything else.
    """
    if isinstance(data, Trajectories):
        return data
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(d, Tensor) for d in data):
        return Trajectories(*data)
    raise GossamerError(
        f"data are {type(data).__name__}; give Trajectories(states, actions) of the dynamics"
    )
