"""Schedule: how much sparsity at which step, and when the kept set may change.

Steps count optimizer updates from 0. Every schedule is a frozen value with one method.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import cos, pi, sin
from typing import NamedTuple

from gossamer.core.errors import GossamerError

__all__ = ["At", "Constant", "Cosine", "Cubic", "Schedule", "StagedSine", "Window"]


class At(NamedTuple):
    """What a schedule says of one step."""

    sparsity: float
    update: bool


class Schedule(ABC):
    """Sparsity as a function of the step."""

    @abstractmethod
    def at(self, step: int) -> At:
        """Sparsity in force at a step (>= 0), and whether the kept set is chosen anew there."""


def _check_share(value: float, name: str) -> None:
    if not 0.0 <= value <= 1.0:
        raise GossamerError(f"{name} is {value!r}; it is a fraction removed, 0 to 1")


def _check_span(start: int, end: int, every: int) -> None:
    if not 0 <= start < end or every < 1:
        raise GossamerError(
            f"a schedule needs 0 <= start < end and every >= 1; got {start}, {end}, {every}"
        )


@dataclass(frozen=True)
class Constant(Schedule):
    """One sparsity throughout; the kept set may change every ``every`` steps until ``end``.

    Parameters
    ----------
    every : 0 for a kept set chosen once, at step 0.
    end : first step without updates; None for no end.
    """

    sparsity: float
    every: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        _check_share(self.sparsity, "sparsity")
        if self.every < 0:
            raise GossamerError(f"every is {self.every}; give 0 for never, or a number of steps")

    def at(self, step: int) -> At:
        if step == 0 or self.every == 0:
            return At(self.sparsity, step == 0)
        return At(self.sparsity, step % self.every == 0 and (self.end is None or step < self.end))


@dataclass(frozen=True)
class Cubic(Schedule):
    """From ``initial`` to ``sparsity``, fast at first: s_f + (s_i - s_f)(1 - t)^3.

    Parameters
    ----------
    start, end : steps of the first and the last update.
    every : steps between updates; in between the sparsity of the last update stays in force.

    Source: arXiv 1710.01878, eq. 1. Departs from the paper: there is always an update at
    ``end``, also when ``every`` does not divide the span.
    """

    sparsity: float
    start: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_share(self.sparsity, "sparsity")
        _check_share(self.initial, "initial")
        _check_span(self.start, self.end, self.every)

    def at(self, step: int) -> At:
        if step < self.start:
            return At(self.initial, False)
        if step >= self.end:
            return At(self.sparsity, step == self.end)
        since = (step - self.start) % self.every
        t = (step - since - self.start) / (self.end - self.start)
        return At(self.sparsity + (self.initial - self.sparsity) * (1.0 - t) ** 3, since == 0)


@dataclass(frozen=True)
class Cosine(Schedule):
    """A quantity annealed from ``initial`` to ``final`` by half a cosine.

    RigL's drop fraction is ``Cosine(initial=0.3, final=0, ...)``; as a sparsity it rises when
    ``final`` is larger. The value moves at every step; ``every`` only says when updates are due.
    """

    initial: float
    final: float
    start: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        _check_span(self.start, self.end, self.every)

    def at(self, step: int) -> At:
        t = min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))
        value = self.final + (self.initial - self.final) * 0.5 * (1.0 + cos(pi * t))
        due = self.start <= step <= self.end and (step - self.start) % self.every == 0
        return At(value, due)


@dataclass(frozen=True)
class StagedSine(Schedule):
    """Stages of growing strength; inside a stage half a sine eases from the last peak.

    Stage i runs over ``[steps[i-1], steps[i])`` and rises from ``peaks[i-1]`` (0 before the
    first) to ``peaks[i]`` as (sin(pi (t - 1/2)) + 1) / 2. Used for ProSparse's regulariser.

    Parameters
    ----------
    steps : ends of the stages, increasing. peaks : value reached at each end.

    Source: arXiv 2402.13516, §3.2.
    """

    steps: tuple[int, ...]
    peaks: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.peaks) or not self.steps:
            raise GossamerError(
                f"a staged sine needs one peak per stage; got {len(self.steps)} stages and "
                f"{len(self.peaks)} peaks"
            )
        if any(b <= a for a, b in zip((0, *self.steps), self.steps, strict=False)):
            raise GossamerError(f"stage ends increase from above 0; got {self.steps}")

    def at(self, step: int) -> At:
        begin, low = 0, 0.0
        for end, high in zip(self.steps, self.peaks, strict=True):
            if step < end:
                t = (step - begin) / (end - begin)
                return At(low + (high - low) * 0.5 * (sin(pi * (t - 0.5)) + 1.0), True)
            begin, low = end, high
        return At(low, False)


@dataclass(frozen=True)
class Window(Schedule):
    """Dense until ``start``, cubic to ``sparsity`` at ``end``, fixed mask afterwards.

    Positions are shares of ``total`` steps; 25 % to 75 % is the window "The Journey Matters"
    (arXiv 2501.12486) found near optimal.
    """

    sparsity: float
    total: int
    start: float = 0.25
    end: float = 0.75
    every: int = 1

    def __post_init__(self) -> None:
        if self.total < 1 or not 0.0 <= self.start < self.end <= 1.0 or self._end <= self._start:
            raise GossamerError(
                f"a window needs total >= 1 and 0 <= start < end <= 1, at least a step apart; "
                f"got {self.total}, {self.start}, {self.end}"
            )

    @property
    def _start(self) -> int:
        return round(self.total * self.start)

    @property
    def _end(self) -> int:
        return round(self.total * self.end)

    def at(self, step: int) -> At:
        return Cubic(self.sparsity, self._start, self._end, self.every).at(step)
