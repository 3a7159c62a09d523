"""Selection by definition.

Shapes: B = batch, H = heads, G = key-value heads, R = H / G, W = last queries, K = keys,
T = tokens, D = head width.
"""

import torch
from torch import Tensor

__all__ = ["UNIT", "block_means_reference", "last_mass_reference", "mass_cut_reference"]

UNIT = 1 << 40
"""Steps a mass of 1 is counted in."""


def last_mass_reference(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of ``last_mass``, in float64: (B, G, K) by key and by distance."""
    (batch, heads, count, width), (_, shared, keys, _) = query.shape, key.shape
    wide = key.double().repeat_interleave(heads // shared, 1)
    score = query.double() @ wide.transpose(2, 3) * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    place = torch.arange(keys, device=key.device)
    position = torch.arange(keys - count, keys, device=key.device)
    seen = place <= position[:, None]
    if first is not None:
        seen = seen & (place >= first.view(-1, 1, 1, 1))
    weight = score.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    weight = weight.view(batch, shared, -1, count, keys).mean(2)
    apart = (position[:, None] - place).clamp_min(0)
    slash = torch.zeros(batch, shared, keys, dtype=torch.float64, device=key.device)
    slash.index_add_(2, apart.flatten(), weight.flatten(2))
    return (weight.sum(2) / count).float(), (slash / count).float()


def block_means_reference(
    x: Tensor, block: int, first: Tensor | None = None, tail: bool = False
) -> Tensor:
    """The definition of ``block_means``: (B, H, ceil(T / block), D) float32, or one more."""
    place = torch.arange(x.shape[2], device=x.device)
    real = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    if first is not None:
        real = place >= first.view(-1, 1)
    parts = []
    starts = [*range(0, x.shape[2], block), *([max(0, x.shape[2] - block)] if tail else [])]
    for at in starts:
        own = real[:, None, at : at + block, None]
        total = (x[:, :, at : at + block].double() * own).sum(2)
        parts.append(total / own.sum(2).clamp_min(1))
    return torch.stack(parts, dim=2).float()


def mass_cut_reference(weights: Tensor, mass: float) -> Tensor:
    """The definition of ``mass_cut``: a stable sort, and sums of whole numbers of 2^-40."""
    flat = weights.float()
    order = flat.sort(dim=-1, descending=True, stable=True).indices
    units = (flat.double() * UNIT).long().gather(-1, order)
    before = units.cumsum(-1) - units
    kept = torch.zeros_like(flat, dtype=torch.bool)
    return kept.scatter(-1, order, before < int(mass * UNIT))
