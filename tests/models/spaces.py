"""A tiny network to be searched, and images in two classes."""

import torch
from torch import Tensor, nn

from gossamer.methods.training.architecture.space import conv_space

__all__ = ["broken_digits", "decisions", "images_to_search", "space"]


def space() -> nn.Module:
    """(N, 1, 6, 6) to four classes; always the same weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return conv_space(1, 4, channels=8, nodes=2).eval()


def images_to_search(samples: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(samples, 1, 6, 6) noise, brighter in one of four rows, and which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (samples,), generator=generator)
    noise = torch.randn(samples, 1, 6, 6, generator=generator)
    noise[torch.arange(samples), 0, labels] += 2.0
    return noise, labels


def broken_digits() -> tuple[Tensor, Tensor]:
    """Of classes that the network does not have."""
    images, labels = images_to_search()
    return images, labels + 7


@torch.no_grad()
def decisions(model: nn.Module) -> Tensor:
    """Logits of other images."""
    return model(images_to_search(8, seed=1)[0])
