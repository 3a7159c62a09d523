"""The scale of the threshold: which lambda skips which share of the tiles, at any length.

The largest weight of a tile relative to its row's largest falls with the number of keys, so
lambda = scale / length transfers between lengths; the scale grows exponentially with the share
skipped: scale(s) = a * exp(b * s), fitted per phase.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import FullIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.methods.attention.tile_skip.threshold import tile_gaps, tile_scores
from gossamer.models import State

__all__ = ["TRIALS", "Scale", "TileCounter", "fit_scale"]

TRIALS: tuple[float, ...] = tuple(10.0 ** (-6 + n / 4) for n in range(25))
"""Values of lambda tried, from 1e-6 to 1."""

_USED = (0.05, 0.95)
"""Shares of skipped tiles that enter the fit: beyond, the curve bends."""


class Scale(NamedTuple):
    """scale(s) = a * exp(b * s) of one phase."""

    a: float
    b: float

    def threshold(self, sparsity: float, length: Tensor) -> Tensor:
        """Lambda for a share of skipped tiles at some lengths, at most 1."""
        return (self.a * math.exp(self.b * sparsity) / length.double()).clamp_max(1.0)


def fit_scale(points: Iterable[tuple[float, float]]) -> Scale:
    """Least squares of ln(scale) on the share skipped.

    Parameters
    ----------
    points : (share of tiles skipped, lambda * length). Shares beyond 0.05 to 0.95 are left out
        while others are there.

    Raises
    ------
    GossamerError
        If no tile was ever skipped or none ever kept: there is no curve.
    """
    inside = [p for p in points if 0.0 < p[0] < 1.0]
    used = [p for p in inside if _USED[0] <= p[0] <= _USED[1]] or inside
    if not used:
        raise GossamerError(
            "no threshold skips some of the tiles and keeps some; calibrate on longer text, or "
            "with a smaller block_size"
        )
    share = torch.tensor([p[0] for p in used], dtype=torch.float64)
    scale = torch.tensor([p[1] for p in used], dtype=torch.float64).log()
    spread = share - share.mean()
    variance = float((spread**2).sum())
    slope = float((spread * scale).sum()) / variance if variance > 1e-12 else 0.0
    # A larger lambda never skips less: a falling curve is noise.
    slope = max(0.0, slope)
    return Scale(math.exp(float(scale.mean()) - slope * float(share.mean())), slope)


@dataclass(frozen=True)
class TileCounter(Selector):
    """Counts, with full attention, which tiles every trial value of lambda would skip.

    Attributes
    ----------
    block_size : queries and keys of a tile.
    counts : (phase, length) to (tiles skipped per trial, tiles that may be skipped or not).
    """

    block_size: int
    counts: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    def select(self, call: Call, layout: Layout, layer: int) -> FullIndex:
        logs = torch.tensor(TRIALS, dtype=call.exact, device=layout.device).log()
        skipped, total = torch.zeros(len(TRIALS), dtype=torch.float64), 0
        for rows, score in tile_scores(call, layout, self.block_size):
            gap = tile_gaps(score, layout, rows, self.block_size)
            reach = (score > -torch.inf).any(3)
            reach = torch.nn.functional.pad(reach, (0, -score.shape[-1] % self.block_size))
            reach = reach.unflatten(3, (-1, self.block_size)).any(-1)
            total += int(reach.sum())
            skipped += (gap[..., None] < logs).sum((0, 1, 2, 3)).double().cpu()
        held = self.counts.setdefault(
            (layout.phase, self._length(layout)), [torch.zeros_like(skipped), torch.zeros(())]
        )
        held[0] += skipped
        held[1] += total
        return FullIndex(layout)

    @staticmethod
    def _length(layout: Layout) -> int:
        """Keys known, rounded up by a quarter of a power of two: decoding steps share a bin."""
        if layout.phase == "prefill":
            return layout.end
        step = max(1, 1 << (layout.end.bit_length() - 3))
        return -(-layout.end // step) * step

    def points(self, phase: str) -> list[tuple[float, float]]:
        """(share of tiles skipped, lambda * length) of every trial and length of a phase."""
        found: list[tuple[float, float]] = []
        for (own, length), (skipped, total) in self.counts.items():
            if own == phase and float(total):
                shares = (skipped / float(total)).tolist()
                found += [(s, t * length) for s, t in zip(shares, TRIALS, strict=True)]
        return found

    def state(self) -> State:
        return State({})
