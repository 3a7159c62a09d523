"""The window executor: each block of queries reads its sinks and one band of keys.

For queries a..b the kept keys lie in the band [a - recent + 1, b] and among the sinks, so
attention costs (sink + recent + block) keys a query instead of T, and no mask larger than that
exists. The band is a slice of the keys; sinks are gathered per row, because rows padded on the
left begin at different places.
Shapes: B = batch, G = key-value heads, K = keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gossamer.methods.attention.index import KeyIndex, WindowIndex

__all__ = ["BLOCK", "refusal", "window_attention", "window_cost"]

BLOCK = 64
"""Queries that share a band: 32 to 64 measured fastest on a CPU for windows of 64 to 256."""

_CACHE = 1 << 26
"""Bytes of masks a layout keeps for its other layers; beyond, each layer makes its own."""

Part = Callable[[slice, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class _Step:
    """One block of queries: its rows, its band, whether it reads sinks, and its mask."""

    rows: slice
    band: slice
    sinks: bool
    mask: Tensor | None


def refusal(index: KeyIndex) -> str | None:
    """Why the window executor cannot run an index, or None when it can."""
    if not isinstance(index, WindowIndex):
        return "the kept keys are no window"
    if not index.layout.regular:
        return "the model's mask is packed, looks ahead, or is fixed for compilation"
    if not index.layout.gapless:
        return "padding lies between real tokens"
    return None


def _plan(index: WindowIndex, block: int) -> list[tuple[slice, slice, bool]]:
    """Rows, band and use of sinks of every step; key places count from the call's first key."""
    layout = index.layout
    steps: list[tuple[slice, slice, bool]] = []
    edges = [*range(0, layout.queries, block), layout.queries]
    for low, high in pairwise(edges):
        last = layout.query_offset + high - layout.key_offset
        first = layout.query_offset + low - index.recent + 1 - layout.key_offset
        first = max(0, first)
        # A band from the first key holds every sink there is.
        steps.append((slice(low, high), slice(first, last), index.sink > 0 and first > 0))
    return steps


def window_cost(index: WindowIndex, block: int = BLOCK) -> int:
    """Pairs the executor computes, masked ones included."""
    total = 0
    for rows, band, sinks in _plan(index, block):
        width = band.stop - band.start + (index.sink if sinks else 0)
        total += (rows.stop - rows.start) * width
    return total


def _steps(index: WindowIndex, block: int) -> list[_Step]:
    layout = index.layout
    name = ("steps", index.sink, index.recent, block)
    if name in layout.memo:
        return layout.memo[name]
    if layout.queries == 1 and layout.causal and layout.padding is None and not layout.key_offset:
        # The newest query sees all of its band and sinks: nothing to ask, nothing to mask.
        rows, band, sinks = _plan(index, block)[0]
        layout.memo[name] = [_Step(rows, _after_sinks(index, band), sinks, None)]
        return layout.memo[name]
    sink_index = _sink_index(index)
    steps = []
    for rows, band, sinks in _plan(index, block):
        query = layout.query_index[rows].view(1, 1, -1, 1)
        key = layout.key_index[band].view(1, 1, 1, -1)
        mask = index.keeps(query, key)
        mask = mask.expand(-1, -1, rows.stop - rows.start, band.stop - band.start)
        if sinks:
            key = sink_index[:, None, None, :]
            # A sink inside the band is read there.
            outside = key < layout.key_offset + band.start
            first = index.keeps(query, key.clamp_max(layout.known - 1)) & outside
            first = first.expand(-1, -1, rows.stop - rows.start, -1)
            size = max(len(first), len(mask))
            mask = torch.cat([m.expand(size, -1, -1, -1) for m in (first, mask)], dim=-1)
        steps.append(_Step(rows, band, sinks, None if bool(mask.all()) else mask))
    if sum(0 if s.mask is None else s.mask.numel() for s in steps) <= _CACHE:
        layout.memo[name] = steps
    return steps


def _after_sinks(index: WindowIndex, band: slice) -> slice:
    """The band without the sinks it overlaps: those are read as sinks."""
    return slice(max(band.start, index.sink), band.stop) if band.start > 0 else band


def _sink_index(index: WindowIndex) -> Tensor:
    """(B, S) absolute index of the first keys still there, as many as may be sinks."""
    layout = index.layout
    count = min(index.sink, layout.keys)
    start = layout.first.clamp_min(layout.key_offset)
    return start[:, None] + torch.arange(count, device=layout.device)


def _sinks(index: WindowIndex, tensor: Tensor) -> Tensor:
    """Keys or values (B, G, K, D) of every row's sinks, (B, G, S, D).

    Places beyond the keys give any row; the masks leave them out.
    """
    layout = index.layout
    if layout.padding is None:
        return tensor[:, :, : index.sink]
    place = (_sink_index(index) - layout.key_offset).clamp_max(layout.keys - 1)
    wanted = place[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, wanted)


def window_attention(
    index: WindowIndex, key: Tensor, value: Tensor, part: Part, block: int = BLOCK
) -> Tensor:
    """Run a window index block by block.

    Parameters
    ----------
    key, value : (B, G, K, D or E).
    part : attention of a slice of the queries over gathered keys and values under a mask;
        returns (B, G, R, q, E).
    block : queries at a time.

    Returns
    -------
    (B, G, R, Q, E).
    """
    steps = _steps(index, block)
    sink_key = sink_value = key
    if any(step.sinks for step in steps):
        sink_key, sink_value = _sinks(index, key), _sinks(index, value)
    outs = []
    for step in steps:
        near_key, near_value = key[:, :, step.band], value[:, :, step.band]
        if step.sinks:
            near_key = torch.cat([sink_key, near_key], dim=2)
            near_value = torch.cat([sink_value, near_value], dim=2)
        outs.append(part(step.rows, near_key, near_value, step.mask))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)
