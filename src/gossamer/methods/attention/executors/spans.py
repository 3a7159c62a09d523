"""The span executor: heads of equal span run together, each group as a plain window.

Nothing outside a head's own window is read, so a head with a short span costs little whatever
the others read.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gossamer.methods.attention.executor import Call, Executor
from gossamer.methods.attention.executors.banded import Banded
from gossamer.methods.attention.executors.basic import Dense
from gossamer.methods.attention.index import FullIndex, KeyIndex
from gossamer.methods.attention.spans.index import Group, SpanIndex
from gossamer.methods.attention.window import refusal, window_cost

__all__ = ["SpanWindows"]

_GATHER_KEYS = 256
"""Keys a decoded token could read in the time that gathering its window takes."""


class SpanWindows(Executor):
    """Reads of every key-value head what its own window keeps.

    Worth it by the rule of the plain window, summed over heads and rows.
    """

    name = "spans"

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        if not isinstance(index, SpanIndex):
            return "the kept keys are no windows by head"
        return refusal(index.groups()[0].index)

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        assert isinstance(index, SpanIndex)
        layout = index.layout
        dense = layout.queries * (layout.end - layout.key_offset)
        spare = _GATHER_KEYS if layout.queries == 1 else 1
        cost = whole = 0
        for group in index.groups():
            heads = len(group.heads)
            cost += heads * min(dense, window_cost(group.index) + spare)
            whole += heads * dense
        return cost < whole

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        assert isinstance(index, SpanIndex)
        groups = index.groups()
        if len(groups) == 1:
            return _run(call, groups[0])
        batch, heads, queries, _ = call.query.shape
        repeat = call.groups[1]
        out = call.query.new_empty(batch, heads, queries, call.value.shape[-1])
        for group in groups:
            rows = slice(None) if group.row is None else slice(group.row, group.row + 1)
            shared = torch.tensor(group.heads, device=out.device)
            own = (shared[:, None] * repeat + torch.arange(repeat, device=out.device)).flatten()
            part = replace(
                call,
                query=call.query[rows][:, own],
                key=call.key[rows][:, shared],
                value=call.value[rows][:, shared],
                sink_logits=None if call.sink_logits is None else call.sink_logits[own],
            )
            out[rows, own] = _run(part, group)
        return out


def _run(call: Call, group: Group) -> Tensor:
    if group.index.whole:
        return Dense().run(call, FullIndex(group.index.layout))
    return Banded().run(call, group.index)
