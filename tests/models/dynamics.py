"""A tiny dynamics model and trajectories of a puck in a frame."""

from functools import cache

import torch
from torch import Tensor, nn

from gossamer.methods.weights.dynamics.data import Trajectories
from gossamer.methods.weights.dynamics.pushing import Pushing

__all__ = ["broken", "perceptron", "predictions", "pushes"]


def perceptron() -> nn.Module:
    """Two hidden layers of eight, always with the same weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
        ).eval()


@cache
def pushes() -> Trajectories:
    return Pushing().sample(64, 2)


def broken() -> Trajectories:
    """Of a world with other states."""
    return Trajectories(torch.zeros(3, 2, 5), torch.zeros(3, 1, 2))


def predictions(model: nn.Module) -> Tensor:
    data = Pushing().sample(16, 1, seed=7)
    with torch.no_grad():
        return model(torch.cat([data.states[:, 0], data.actions[:, 0]], 1))
