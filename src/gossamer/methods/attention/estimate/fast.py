"""Estimates by the selection kernels, where they can run; the same numbers up to rounding.

None of them stores the scores of the last queries or sorts a map of blocks. A plain call
(causality alone, no padding) goes from its tensors to block lists in a dozen launches, and the host
waits once.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gossamer.core.scores.attention_estimate import block_means as plain_means
from gossamer.core.scores.attention_estimate import mass_count
from gossamer.kernels.attention_select import (
    Tiling,
    block_lists,
    block_means,
    cover_lines,
    last_mass,
    mass_cut,
    pooled_share,
    select_refusal,
    top_lines,
)
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout

__all__ = [
    "covered_lists",
    "covering",
    "line_lists",
    "means",
    "on_device",
    "plain",
    "plain_mass",
    "plain_share",
    "tail_mass",
]

_HELD = 1 << 27
"""Entries of a map of blocks held at once."""


def plain(call: Call, layout: Layout, count: int) -> bool:
    """Whether kernels take a call whole, and so many last queries of it."""
    refused = select_refusal(call.query, call.key, queries=count) is not None
    return layout.plain and not refused and 0 <= _base(layout) <= layout.keys - layout.queries


def plain_mass(call: Call, layout: Layout, count: int) -> tuple[Tensor, Tensor]:
    """Share of a plain call's last queries' attention, (B, G, K) by key and by distance."""
    end = _base(layout) + layout.queries
    query = call.query[:, :, max(0, layout.queries - count) :]
    found = last_mass(query, call.key[:, :, :end], scale=call.factor, softcap=call.softcap)
    if end == layout.keys:
        return found
    vertical, slash = (torch.nn.functional.pad(x, (0, layout.keys - end)) for x in found)
    return vertical, slash


def plain_share(call: Call, layout: Layout, block: int) -> tuple[Tensor, Tensor] | None:
    """Attention between block means of a plain call whose queries begin with a block of keys.

    Returns
    -------
    (B, G, n, m), sums to 1 over the map; and of the last ``block`` queries' mean, (B, G, m).
    """
    if not plain(call, layout, 1) or _base(layout) % block:
        return None
    query, key = block_means(call.query, block, tail=True), block_means(call.key, block)
    options = {"scale": call.factor, "softcap": call.softcap}
    return pooled_share(query, key, base=_base(layout) // block, **options)


def covered_lists(
    call: Call, layout: Layout, block: int, gamma: float, tau: float, least: int
) -> tuple[Tensor, Tensor] | None:
    """FlexPrefill's lists (indptr, indices) of a plain call, or None where no kernel can.

    Parameters
    ----------
    block : queries and keys of a block. gamma : mass to cover. tau : largest Jensen-Shannon
        distance of a guess that is trusted. least : fewest columns, and diagonals.
    """
    if not plain(call, layout, min(block, layout.queries)) or _base(layout) % block:
        return None
    tiling = Tiling(layout.queries, layout.keys, _base(layout), block, block)
    end = tiling.base + tiling.queries
    vertical, slash = (x[..., :end] for x in plain_mass(call, layout, block))
    query, key = block_means(call.query, block, tail=True), block_means(call.key, block)
    repeat = call.groups[1]
    step = max(1, _HELD // (len(query) * tiling.rows * tiling.columns))
    kept: list[Tensor] = []
    guesses: list[Tensor] = []
    for at in range(0, key.shape[1], step):
        part = query[:, at * repeat : (at + step) * repeat], key[:, at : at + step]
        options = {"scale": call.factor, "softcap": call.softcap}
        share, guess = pooled_share(*part, base=tiling.base // block, **options)
        kept.append(mass_cut(share.flatten(2), gamma).view(share.shape))
        guesses.append(guess)
    whole = {"block": block, "gamma": gamma, "tau": tau, "least": least}
    columns, diagonals, good = cover_lines(_joined(guesses), vertical, slash, **whole)
    return block_lists(tiling, kept=_joined(kept), use=good, lines=(columns, diagonals))


def line_lists(
    mass: tuple[Tensor, Tensor],
    layout: Layout,
    block: int,
    wanted: Sequence[tuple[int, int, int, int]],
    sink: int,
    local: int,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lists of a plain call's columns, diagonals and windows: indptr, indices, places of columns.

    Parameters
    ----------
    mass : as :func:`plain_mass` gives it. wanted : of every key-value head, keys, distances, first
        blocks of keys, latest keys (far below 0 for none). sink, local : first keys and nearest
        distances, chosen before all others. kept : (B, G, n, m), blocks to read besides.
    """
    tiling = Tiling(layout.queries, layout.keys, _base(layout), block, block)
    vertical, slash = (x[..., : tiling.base + tiling.queries] for x in mass)
    width = max(one[0] for one in wanted)
    numbers = on_device(tuple(wanted), vertical.device)
    places, columns, diagonals = top_lines(
        *(vertical, slash, numbers, tiling), width=width, sink=sink, local=local
    )
    indptr, indices = block_lists(tiling, kept=kept, lines=(columns, diagonals))
    return indptr, indices, places if width else None


def _base(layout: Layout) -> int:
    """Place of the first query."""
    return layout.query_offset - layout.key_offset


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@lru_cache(maxsize=1024)
def on_device(numbers: tuple[object, ...], device: torch.device) -> Tensor:
    """int32 tensor of nested tuples of numbers. Kept, for every copy to a device waits for it."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def tail_mass(
    call: Call, layout: Layout, rows: slice, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Share of the last queries' attention by key and by distance, or None where no kernel can.

    Parameters
    ----------
    rows : of the batch. query : (b, G, R, q, D), the last of which stands at the last key.
    key : (b, G, k, D).

    Returns
    -------
    (b, G, k) twice.
    """
    flat = query.flatten(1, 2)
    if not (layout.causal and layout.regular) or flat.shape[2] > key.shape[2]:
        return None
    if select_refusal(flat, key, queries=flat.shape[2]) is not None or not layout.gapless:
        return None
    first = None
    if layout.padding is not None:
        first = (layout.first[rows] - layout.key_offset).clamp_min(0)
    return last_mass(flat, key, scale=call.factor, softcap=call.softcap, first=first)


def means(tensor: Tensor, block: int, real: Tensor | None) -> Tensor:
    """``block_means`` of core, in one pass where a kernel runs; (B, ..., T, D)."""
    if real is not None or select_refusal(tensor) is not None:
        return plain_means(tensor, block, real)
    found = block_means(tensor.flatten(1, -3), block)
    return found.unflatten(1, tensor.shape[1:-2])


def covering(share: Tensor, mass: float, first_ranks: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The fewest largest entries of every row (b, n) that reach a mass, as a mask.

    Parameters
    ----------
    first_ranks : marks so many of the largest: how it is done where no kernel runs.
    """
    if select_refusal(share[:, :1]) is None:
        return mass_cut(share, mass)
    return first_ranks(share, mass_count(share, mass)[:, None])
