"""Break-even, measured: is a sparse call, selection included, faster than full attention?

The answer depends on device, shapes and how many keys a method keeps, so it is measured where it
is asked: for each kind of call (phase, power of two of the context, batch) the first sparse call
warms up, the second is timed beside the full attention of the same call, and the faster of the
two runs from then on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import run
from gossamer.methods.attention.index import FullIndex
from gossamer.methods.attention.layout import Layout

__all__ = ["BreakEven", "Timing"]


class Timing(NamedTuple):
    """Seconds of one attention call: full, choosing keys, attending to them."""

    dense: float
    select: float
    attend: float


@dataclass(frozen=True)
class _Kind:
    phase: str
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.phase} at {1 << self.size} tokens, batch {self.batch}"


class BreakEven:
    """Timings by kind of call, and the choice that follows from them."""

    def __init__(self) -> None:
        self.timings: dict[_Kind, Timing] = {}
        self._warm: set[_Kind] = set()

    def prefers_dense(self, call: Call, layout: Layout) -> bool:
        """Whether full attention was measured faster for calls of this kind."""
        timing = self.timings.get(_kind(call, layout))
        return timing is not None and timing.dense <= timing.select + timing.attend

    @contextmanager
    def timed(self, call: Call, layout: Layout) -> Iterator[Callable[[], None]]:
        """Time the block's selection (until it calls what is yielded) and attention, if due."""
        kind = _kind(call, layout)
        if kind in self.timings:
            yield lambda: None
            return
        begun, marks = _now(call), list[float]()
        yield lambda: marks.append(_now(call))
        ended = _now(call)
        full = FullIndex(layout)
        run("dense", call, full)
        dense = _now(call) - ended
        if kind in self._warm and marks:
            self.timings[kind] = Timing(dense, marks[0] - begun, ended - marks[0])
        self._warm.add(kind)

    def notes(self) -> list[str]:
        """Each kind in a sentence."""
        return [
            f"{kind}: full attention {t.dense * 1e3:.2f} ms, selection {t.select * 1e3:.2f} + "
            f"attention {t.attend * 1e3:.2f} ms; "
            + ("runs full" if t.dense <= t.select + t.attend else "runs sparse")
            for kind, t in self.timings.items()
        ]


def _kind(call: Call, layout: Layout) -> _Kind:
    return _Kind(layout.phase, max(1, layout.end - 1).bit_length(), call.query.shape[0])


def _now(call: Call) -> float:
    if call.query.device.type == "cuda":
        torch.cuda.synchronize(call.query.device)
    return perf_counter()
