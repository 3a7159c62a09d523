"""From estimates to block lists, by definition. Shapes as in lists.py."""

from typing import Any

import torch
from torch import Tensor

from gossamer.core.scores.attention_estimate import (
    block_weights,
    diagonal_blocks,
    jensen_shannon,
    mass_count,
)

__all__ = [
    "block_lists_reference",
    "cover_lines_reference",
    "pooled_share_reference",
    "top_lines_reference",
]


def pooled_share_reference(
    query: Tensor, key: Tensor, base: int, scale: float | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The definition of ``pooled_share``."""
    (batch, _, rows, width), (_, shared, blocks, _) = query.shape, key.shape
    reach = base + torch.arange(rows, device=key.device).clamp_max(rows - 2)
    seen = torch.arange(blocks, device=key.device) <= reach[:, None]
    grouped = query.view(batch, shared, -1, rows, width)
    factor = width**-0.5 if scale is None else scale
    weights = block_weights(grouped, key, factor, seen[None, None], softcap)
    return weights[:, :, :-1] / (rows - 1), weights[:, :, -1]


def cover_lines_reference(
    guess: Tensor,
    vertical: Tensor,
    slash: Tensor,
    block: int,
    gamma: float,
    tau: float,
    least: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of ``cover_lines``."""
    blocks, keys = guess.shape[-1], slash.shape[-1]
    by_block = torch.nn.functional.pad(vertical, (0, blocks * block - keys))
    by_block = by_block.unflatten(-1, (blocks, block)).sum(-1)
    good = jensen_shannon(guess, by_block) < tau
    diagonal = diagonal_blocks(slash, block)
    # What seemed to cross the last diagonal cannot: the first keys lie in its corner.
    diagonal[..., -1] += slash.sum(-1) - diagonal.sum(-1)
    kept: list[Tensor] = []
    for mass in (by_block, diagonal):
        count = torch.where(good, least, mass_count(mass, gamma).clamp_min(least))
        order = mass.sort(dim=-1, descending=True, stable=True).indices
        first = torch.arange(mass.shape[-1], device=mass.device) < count[..., None]
        flags = torch.zeros_like(first).scatter(-1, order, first)
        flags[..., 0] = True
        kept.append(flags)
    diagonals = torch.nn.functional.pad(kept[1], (1, blocks + 1 - kept[1].shape[-1]))
    return kept[0], diagonals, good


def top_lines_reference(
    vertical: Tensor,
    slash: Tensor,
    wanted: Tensor,
    tiling: Any,
    width: int,
    sink: int,
    local: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of ``top_lines``."""
    batch, shared, keys = slash.shape
    side, blocks = tiling.wide, tiling.columns
    place = torch.arange(keys, device=slash.device)
    keep, apart, near, recent = wanted.long().view(1, shared, 4, 1).unbind(2)

    def best(score: Tensor, forced: int, count: Tensor) -> Tensor:
        score = score.masked_fill(place < forced, torch.inf)
        order = score.sort(dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(order).scatter(-1, order, (place < count).long()).bool()

    # What is not chosen becomes K, which sorts to the end and is then -1.
    chosen = place.where(best(vertical, sink, keep.expand(batch, -1, -1)), keys)
    chosen = chosen.sort(dim=-1).values
    places = torch.nn.functional.pad(chosen, (0, max(0, width - keys)), value=keys)[..., :width]
    columns = torch.arange(blocks, device=slash.device) < near.expand(batch, -1, -1)
    start = (torch.arange(blocks + 2, device=slash.device) - 1) * side + tiling.base % side
    diagonals = (start < side + recent - 1).expand(batch, -1, -1).clone()
    distances = best(slash, local, apart.expand(batch, -1, -1))
    touched = (place - start[:, None]).abs() < side
    diagonals |= (distances[:, :, None] & touched).any(-1)
    return places.masked_fill(places == keys, -1), columns, diagonals


def block_lists_reference(
    tiling: Any, kept: Tensor | None, use: Tensor | None, lines: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The definition of ``block_lists``."""
    if kept is not None and use is not None:
        kept = kept & use[:, :, None, None]
    if lines is not None:
        columns, diagonals = lines
        rows = torch.arange(tiling.rows, device=columns.device)[:, None]
        column = torch.arange(tiling.columns, device=columns.device)
        at = rows - column + tiling.base // tiling.wide + 1
        inside = (at >= 0) & (at < diagonals.shape[-1])
        named = diagonals[:, :, at.clamp(0, diagonals.shape[-1] - 1)] & inside
        named = named | columns[:, :, None]
        named = named if kept is None else named | kept
        last = tiling.base + ((rows + 1) * tiling.high).clamp_max(tiling.queries) - 1
        kept = named & (column * tiling.wide <= last)
    assert kept is not None
    ends = torch.nn.functional.pad(kept.sum(-1), (1, 0)).flatten().cumsum(0)
    return ends.view(*kept.shape[:2], -1), kept.flatten().nonzero()[:, 0] % kept.shape[-1]
