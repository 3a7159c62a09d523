"""Training a masked-diffusion language model: mask a random share, predict what was masked.

The share of each sample is uniform on (0, 1), so every stage of denoising is seen.

Source: Large Language Diffusion Models (LLaDA, arXiv 2502.09992), §2.

Departs from the paper: the loss is the mean over masked tokens. The paper divides each sample's
sum by its share (a bound on the likelihood), which small batches drown in noise.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core import GossamerError
from gossamer.methods.attention.diffusion.model import MaskedDiffusionLM
from gossamer.models import Inputs, Progress
from gossamer.models.fit import FitPlan, fit

__all__ = ["denoising_loss", "mask_some", "train"]


def mask_some(fillable: Tensor, share: Tensor) -> Tensor:
    """Which tokens are masked: each fillable one with its sample's share, at least one a sample.

    Parameters
    ----------
    fillable : bool (B, T). share : (B,), 0 to 1.

    Returns
    -------
    bool (B, T).
    """
    chance = torch.rand(fillable.shape, device=fillable.device).masked_fill(~fillable, 2.0)
    least = chance == chance.amin(1, keepdim=True)
    return fillable & ((chance < share[:, None]) | least)


def denoising_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of masked tokens, of ``input_ids`` (B, T) and ``fillable`` bool (B, T).

    Shares are stratified over the batch: uniform all the same, and the mean is less noisy.
    """
    ids, fillable = batch["input_ids"], batch["fillable"]
    rows = len(ids)
    start = torch.rand(1, device=ids.device) + torch.arange(rows, device=ids.device) / rows
    hidden = mask_some(fillable, start % 1.0)
    logits = model(ids.masked_fill(hidden, cast(Any, model).mask))
    return functional.cross_entropy(logits[hidden], ids[hidden])


def train(
    model: MaskedDiffusionLM, data: Inputs, plan: FitPlan, *, progress: Progress | None = None
) -> tuple[float, ...]:
    """Train in place; the loss before every update.

    Parameters
    ----------
    data : ``input_ids`` (N, T) and ``fillable`` bool (N, T), True where a token may be masked.

    Raises
    ------
    GossamerError
        If a sample has nothing to fill, or already holds the mask token.
    """
    ids, fillable = data.values.get("input_ids"), data.values.get("fillable")
    if ids is None or fillable is None or fillable.dtype != torch.bool:
        raise GossamerError(
            f"the data holds {', '.join(data.values)}; give input_ids and a bool fillable"
        )
    if not bool(fillable.any(1).all()):
        raise GossamerError("a sample has no token that may be masked; leave it out")
    if bool((ids == model.mask).any()):
        raise GossamerError(f"the data holds the mask token {model.mask}; give texts without it")
    return fit(
        model, data, plan, loss=denoising_loss, progress=progress, what="training to denoise"
    )
