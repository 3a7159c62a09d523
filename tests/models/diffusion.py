"""A tiny masked-diffusion language model for the generated checks."""

import torch
from torch import Tensor, nn

from gossamer.methods.attention.diffusion.model import DiffusionConfig, MaskedDiffusionLM
from gossamer.methods.attention.diffusion.steps import denoising

__all__ = ["MASK", "PROMPT", "denoised", "diffusion_lm", "half_masked"]

VOCABULARY, PROMPT, LENGTH, STEPS = 33, 18, 32, 5
MASK = VOCABULARY - 1


def diffusion_lm(seed: int = 0) -> MaskedDiffusionLM:
    """Two blocks, width 32, four heads; random weights, equal for equal seeds."""
    config = DiffusionConfig(vocabulary=VOCABULARY, mask=MASK, width=32, layers=2, heads=4)
    return MaskedDiffusionLM(config, seed).eval()


def half_masked(rows: int = 2, seed: int = 7) -> Tensor:
    """(rows, 32) token ids, masked behind the prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, MASK, (rows, LENGTH), generator=generator)
    ids[:, PROMPT:] = MASK
    return ids


@torch.no_grad()
def denoised(model: nn.Module) -> Tensor:
    """Logits of the last of five steps over the same tokens."""
    ids = half_masked()
    with denoising(prompt=PROMPT, steps=STEPS):
        outs = [model(ids) for _ in range(STEPS)]
    return outs[-1]
