"""Activations of labelled windows: of every token, of the last, or their mean.

Shapes: N windows of T tokens, D = width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.methods.features.hooks import record
from gossamer.models import Tokens

__all__ = ["Pooling", "gathered", "pooled"]

Pooling = Literal["mean", "last"]


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """(N, T, D) to (N, D): the mean over real tokens, or the last real one."""
    if pooling == "mean":
        weight = mask.to(hidden.dtype)
        return (hidden * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), ends]


@torch.no_grad()
def gathered(
    model: nn.Module,
    tokens: Tokens,
    paths: tuple[str, ...],
    pooling: Pooling = "last",
    *,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """Path to (N, D) float32 activations of windows, one row a window."""
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    for start in range(0, len(tokens), batch_size):
        part = tokens.slice(start, start + batch_size)
        mask = part.attention_mask.to(device)
        seen = record(model, paths, next(part.batches(len(part), device)))
        for path, hidden in seen.items():
            found[path].append(pooled(hidden.float(), mask, pooling))
    return {path: torch.cat(parts) for path, parts in found.items()}
