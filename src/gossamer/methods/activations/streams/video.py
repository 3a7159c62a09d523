"""Synthetic video: shapes that move over a still background, drawn in code.

Shapes: N clips, T frames, S side of a frame.
"""

import torch
from torch import Tensor

from gossamer.core import check_count
from gossamer.models import Inputs

__all__ = ["SHAPES", "moving", "moving_shapes"]

SHAPES = ("square", "disc", "cross")


def moving(
    sprites: Tensor, frames: int, size: int, generator: torch.Generator, *, background: float = 0.2
) -> Tensor:
    """Clips in which a sprite moves a pixel a frame and bounces off the borders.

    Parameters
    ----------
    sprites : (N, s, s) with values 0 to 1, s <= size. frames : T. size : S.
    background : strength of a still noise texture of every clip, 0 for black.

    Returns
    -------
    (N, T, 1, S, S) with values 0 to 1.
    """
    count, side = sprites.shape[:2]
    room = size - side
    at = torch.randint(0, room + 1, (count, 2), generator=generator)
    pace = torch.randint(0, 2, (count, 2), generator=generator) * 2 - 1
    still = background * torch.rand(count, 1, size, size, generator=generator)
    clips = still[:, None].repeat(1, frames, 1, 1, 1)
    for frame in range(frames):
        for clip in range(count):
            y, x = at[clip].tolist()
            window = clips[clip, frame, 0, y : y + side, x : x + side]
            torch.maximum(window, sprites[clip], out=window)
        outside = (at + pace < 0) | (at + pace > room)
        pace = torch.where(outside, -pace, pace)
        at = (at + pace).clamp(0, room)
    return clips


def _sprites(side: int) -> Tensor:
    """One sprite of every kind, (3, side, side)."""
    line = torch.arange(side) - (side - 1) / 2
    square = (line.abs()[:, None] <= side / 3) & (line.abs()[None] <= side / 3)
    disc = line[:, None] ** 2 + line[None] ** 2 <= (side / 2) ** 2
    cross = (line.abs()[:, None] < 1) | (line.abs()[None] < 1)
    return torch.stack([square, disc, cross]).float()


def moving_shapes(count: int, *, frames: int = 8, size: int = 16, seed: int = 0) -> Inputs:
    """Labelled clips of a square, a disc or a cross on a still texture.

    Parameters
    ----------
    count : N. frames : T. size : S, at least 8.

    Returns
    -------
    ``frames`` (N, T, 1, S, S) and ``labels`` (N,), indices of :data:`SHAPES`.
    """
    check_count("count", count, 1)
    check_count("frames", frames, 1)
    check_count("size", size, 8)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(SHAPES), (count,), generator=generator)
    clips = moving(_sprites(size // 2)[labels], frames, size, generator)
    return Inputs({"frames": clips, "labels": labels})
