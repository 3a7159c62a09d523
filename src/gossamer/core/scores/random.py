"""The baseline every score must beat."""

import torch
from torch import Tensor

__all__ = ["uniform_random"]


def uniform_random(like: Tensor, seed: int) -> Tensor:
    """Uniform noise on [0, 1), the same for a seed on every device and dtype.

    Parameters
    ----------
    like : gives shape and device.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape, generator=generator, dtype=torch.float32).to(like.device)
