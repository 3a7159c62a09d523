"""Axes: from values to pixels, and which values get a tick."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log, log10

__all__ = ["Scale", "linear_ticks", "log_ticks", "spread"]


@dataclass(frozen=True)
class Scale:
    """A map from [low, high] to pixels, straight or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Pixels of a value; a value outside the range is put on its edge."""
        return self.beyond(min(max(value, self.low), self.high))

    def beyond(self, value: float) -> float:
        """Pixels of a value, outside the axis where the value is outside the range."""
        if self.logarithmic:
            share = log(value / self.low) / log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values in a range, at most about ``most``."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** floor(log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw), 10 * power)
    first = ceil(low / step - 1e-9)
    last = floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round values in a range of a logarithmic axis: decades first, then between them."""
    if high / low < 2:
        return linear_ticks(low, high, most)
    found: list[float] = []
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        powers = range(floor(log10(low)), ceil(log10(high)) + 1)
        ticks = [m * 10.0**p for p in powers for m in mantissas]
        ticks = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
        if found and len(ticks) > most:
            break
        found = ticks
    return found


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions as little as needed so that none is closer than ``gap``.

    Least squares: crowded labels share their displacement around their mean (pool adjacent
    violators on the positions less their gaps). Returned in the order given. When they do not
    all fit between low and high, the gap shrinks.
    """
    if len(places) > 1:
        gap = min(gap, (high - low) / (len(places) - 1))
    order = sorted(range(len(places)), key=lambda i: places[i])
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([places[index] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            mean, count = pools.pop()
            before, others = pools[-1]
            pools[-1] = [(before * others + mean * count) / (others + count), others + count]
    level = [mean for mean, count in pools for _ in range(int(count))]
    room = high - low - gap * (len(places) - 1)
    moved = [0.0] * len(places)
    for rank, index in enumerate(order):
        moved[index] = low + min(max(level[rank] - low, 0.0), room) + rank * gap
    return moved
