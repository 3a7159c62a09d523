"""A tiny sparse coder and patches that few atoms explain, one set of them with a hole."""

import torch
from torch import Tensor, nn

from gossamer.methods.features.vision import SparseCoder

__all__ = ["broken_patches", "coder", "patches", "recoded"]

PIXELS = 16


def coder() -> nn.Module:
    """24 atoms of 4 x 4 pixels; always the same ones."""
    return SparseCoder(PIXELS, 24, weight=0.3, steps=20, seed=11).eval()


def patches(count: int = 300, seed: int = 0) -> Tensor:
    """(count, 16): sums of two of 20 hidden atoms, and noise."""
    hidden = torch.randn(20, PIXELS, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    pick = torch.rand(count, 20, generator=generator).argsort(1)[:, :2]
    size = 1 + torch.rand(count, 2, generator=generator)
    noise = 0.05 * torch.randn(count, PIXELS, generator=generator)
    return (hidden[pick] * size[..., None]).sum(1) + noise


def broken_patches() -> Tensor:
    """A pixel is missing."""
    data = patches()
    data[250, 3] = float("nan")
    return data


def recoded(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(patches(16, seed=1))
