"""Sampling from a masked-diffusion model: keep the surest predictions, one share a step.

Shapes: B = batch, T = tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, check_count
from gossamer.methods.attention.diffusion.steps import denoising

__all__ = ["sample"]


@torch.no_grad()
def sample(
    model: nn.Module, ids: Tensor, *, prompt: int, steps: int, mask: int | None = None
) -> Tensor:
    """Fill every mask token, the surest first.

    At step s of S, of the tokens still masked the ceil(left / (S - s + 1)) surest are set to
    their likeliest token and stay. Ties go to the lower position.

    Parameters
    ----------
    model : ids (B, T) to logits (B, T, V), or to an output with ``logits``.
    ids : (B, T), the mask token where something is to be filled; every row masks equally many.
    prompt : tokens at the front that are the prompt. steps : 1 to the masked tokens of a row.
    mask : the mask token's id; None takes ``model.mask``.

    Returns
    -------
    (B, T), without mask tokens. The model's mode is as before.

    Raises
    ------
    GossamerError
        If rows mask different numbers of tokens, or there are more steps than masked tokens.

    Source: Large Language Diffusion Models (LLaDA, arXiv 2502.09992), low-confidence remasking.
    """
    mask = int(cast(Any, model).mask if mask is None else mask)
    counts = (ids == mask).sum(1)
    left = int(counts[0])
    if bool((counts != left).any()):
        raise GossamerError(
            f"rows mask {int(counts.min())} to {int(counts.max())} tokens; give rows that mask "
            "equally many"
        )
    check_count("steps", steps, 1)
    if steps > left:
        raise GossamerError(f"steps is {steps} for {left} masked tokens; give at most one a token")
    ids, training = ids.clone(), model.training
    model.eval()
    try:
        with denoising(prompt=prompt, steps=steps):
            for step in range(steps):
                count = -(-left // (steps - step))
                ids, left = _fill(model, ids, mask, count), left - count
    finally:
        model.train(training)
    return ids


def _fill(model: nn.Module, ids: Tensor, mask: int, count: int) -> Tensor:
    """Set the ``count`` surest masked tokens of every row."""
    found = model(ids)
    logits = getattr(found, "logits", found).float()
    logits[..., mask] = -torch.inf
    sure, best = logits.softmax(-1).max(-1)
    sure = sure.masked_fill(ids != mask, -1.0)
    chosen = sure.argsort(dim=1, descending=True, stable=True)[:, :count]
    return ids.scatter(1, chosen, best.gather(1, chosen))
