"""A tiny autoencoder and a table of features that depend on each other, one of them constant."""

import torch
from torch import Tensor, nn

__all__ = ["autoencoder", "broken_table", "reconstruction", "table"]

FEATURES = 12


def autoencoder() -> nn.Module:
    """12 features, 16 hidden units; always the same weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(FEATURES, 16), nn.Sigmoid(), nn.Linear(16, FEATURES)
        return nn.Sequential(*layers).eval()


def table(samples: int = 60, seed: int = 0) -> Tensor:
    """(samples, 12): eight features made of three hidden ones, three of noise, one constant."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))
    real = torch.randn(samples, 3, generator=generator) @ mix
    noise = torch.randn(samples, 3, generator=generator)
    return torch.cat([5 + 2 * real, noise, torch.full((samples, 1), 7.0)], 1)


def broken_table() -> Tensor:
    """One value is missing."""
    data = table()
    data[30, 2] = float("nan")
    return data


def reconstruction(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(table(16, seed=1) / 5)
