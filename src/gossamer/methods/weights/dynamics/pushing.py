"""A world with contact: a puck that lies in a square frame and is pushed by its sides.

The frame is moved; the puck stays where it is until a side touches it, and then goes with that
side (quasi-static, no friction along the side). Both are points of the plane with piecewise-
linear dynamics, so few ReLUs can describe them exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.methods.weights.dynamics.data import Trajectories
from gossamer.methods.weights.dynamics.network import SparseNet

__all__ = ["Pushing"]


@dataclass(frozen=True)
class Pushing:
    """State (frame x, frame y, puck x, puck y); action (frame dx, frame dy).

    Parameters
    ----------
    gap : distance from the frame's centre to a side's contact with the puck.
    reach : largest step of the frame along each axis.
    """

    gap: float = 0.3
    reach: float = 0.2

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """(..., 4) and (..., 2) to the next state (..., 4)."""
        frame = state[..., :2] + action.clamp(-self.reach, self.reach)
        puck = torch.minimum(torch.maximum(state[..., 2:], frame - self.gap), frame + self.gap)
        return torch.cat([frame, puck], -1)

    def starts(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 4) states with the puck anywhere inside the frame, the frame within [-1, 1]."""
        frame = 2 * torch.rand(count, 2, generator=generator) - 1
        inside = self.gap * (2 * torch.rand(count, 2, generator=generator) - 1)
        return torch.cat([frame, frame + inside], -1)

    def sample(self, count: int, steps: int, seed: int = 0) -> Trajectories:
        """Trajectories under random actions."""
        generator = torch.Generator().manual_seed(seed)
        states = [self.starts(count, generator)]
        actions = self.reach * (2 * torch.rand(count, steps, 2, generator=generator) - 1)
        for t in range(steps):
            states.append(self.step(states[-1], actions[:, t]))
        return Trajectories(torch.stack(states, 1), actions)

    def exact(self) -> SparseNet:
        """The world's change of state as a network of four ReLUs.

        With r = puck - frame - action, the puck moves by relu(-gap - r) - relu(r - gap).
        """
        eye = torch.eye(2)
        reads = torch.cat([-eye, eye, -eye], 1)
        first = torch.cat([-reads, reads])
        none = torch.zeros(2, 4)
        direct = torch.cat([torch.zeros(2, 4), eye], 1)
        last = torch.cat([torch.cat([none, eye], 1), torch.cat([eye, -eye, 0 * eye], 1)])
        kinds = torch.tensor([0, 0, 0, 0, 1, 1])
        bias = torch.tensor([-self.gap] * 4 + [0.0] * 2)
        return SparseNet((torch.cat([first, direct]), last), (bias, torch.zeros(4)), (kinds,))
