"""The last queries of a call, row by row where rows are padded on the right.

Where their attention lies is taken for where the whole prompt's lies. In a chunked prefill they
are the last queries of each chunk, so an estimate never looks beyond the chunk at hand.
Shapes: B = batch, G = key-value heads, R = query heads per key-value head, K = keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.scores.attention_estimate import vertical_slash_mass
from gossamer.methods.attention.estimate import fast
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout

__all__ = ["Tail", "last_mass", "tail_mass", "tails"]


@dataclass(frozen=True, eq=False)
class Tail:
    """The last queries of rows that end at the same key.

    Parameters
    ----------
    rows : of the batch. query : (b, G, R, q, D). key : (b, G, k, D), up to the last query's own.
    seen : bool, (b or 1, 1, q, k), what the model lets through.
    """

    rows: slice
    query: Tensor
    key: Tensor
    seen: Tensor


def tails(call: Call, layout: Layout, count: int) -> Iterator[Tail]:
    """The last ``count`` queries of every row that are no padding."""
    batch = call.query.shape[0]
    query = call.grouped_query()
    ends = _ends(layout)
    groups = [(slice(0, batch), ends[0])]
    if len(set(ends)) > 1:
        groups = [(slice(row, row + 1), end) for row, end in enumerate(ends)]
    for rows, end in groups:
        first = max(0, end - count)
        keys = min(layout.query_offset - layout.key_offset + end, layout.keys)
        seen = layout.mask(slice(first, end))[..., :keys]
        yield Tail(
            rows,
            query[rows, :, :, first:end],
            call.key[rows, :, :keys],
            seen[rows] if len(seen) > 1 else seen,
        )


def _ends(layout: Layout) -> list[int]:
    """One more than the last query of each row that is no padding; all queries without padding."""
    if layout.padding is None:
        return [layout.queries]
    real = layout.padding[:, layout.query_offset : layout.query_offset + layout.queries]
    if bool(real[:, -1].all()):
        return [layout.queries]
    at = torch.arange(1, layout.queries + 1, device=real.device)
    # A row of nothing but padding keeps one query, which reads nothing.
    return [max(1, int(end)) for end in (real * at).amax(1).tolist()]


def last_mass(call: Call, layout: Layout, count: int) -> tuple[Tensor, Tensor]:
    """Share of the last queries' attention each key and each distance receives.

    Returns
    -------
    vertical, slash : (B, G, K), by place and by distance from the query; both sum to 1.
    """
    if fast.plain(call, layout, min(count, layout.queries)):
        return fast.plain_mass(call, layout, count)
    batch, (shared, _) = call.query.shape[0], call.groups
    size = (batch, shared, layout.keys)
    vertical = torch.zeros(size, dtype=call.exact, device=call.query.device)
    slash = torch.zeros_like(vertical)
    for tail in tails(call, layout, count):
        found = tail_mass(call, layout, tail)
        vertical[tail.rows, :, : tail.key.shape[2]] = found[0]
        slash[tail.rows, :, : tail.key.shape[2]] = found[1]
    return vertical, slash


def tail_mass(call: Call, layout: Layout, tail: Tail) -> tuple[Tensor, Tensor]:
    """Share of some rows' last queries' attention, (b, G, k) by place and by distance."""
    found = fast.tail_mass(call, layout, tail.rows, tail.query, tail.key)
    if found is not None:
        return found
    return vertical_slash_mass(tail.query, tail.key, call.factor, tail.seen, call.softcap)
