"""The window executor: sinks and a band for each block of queries, O(T * window)."""

from torch import Tensor

from gossamer.methods.attention.executor import Call, Executor, attend
from gossamer.methods.attention.index import KeyIndex, WindowIndex
from gossamer.methods.attention.window import refusal, window_attention, window_cost

__all__ = ["Banded"]

_GATHER_KEYS = 256
"""Keys a decoded token could read in the time that gathering its window takes."""


class Banded(Executor):
    """Reads what a window keeps and nothing else.

    Worth it when its pairs, masked ones included, are fewer than the Q * K of a dense mask, and
    for a single query when at least 256 keys go (the break-even measured on a CPU by
    ``benchmarks/window_attention.py``).
    """

    name = "window"

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        return refusal(index)

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        assert isinstance(index, WindowIndex)
        layout = index.layout
        spare = _GATHER_KEYS if layout.queries == 1 else 1
        dense = layout.queries * (layout.end - layout.key_offset)
        return window_cost(index) + spare <= dense

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        assert isinstance(index, WindowIndex)
        query = call.grouped_query()

        def part(rows: slice, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return attend(call, query[:, :, :, rows], key, value, mask)

        return window_attention(index, call.key, call.value, part).flatten(1, 2)
