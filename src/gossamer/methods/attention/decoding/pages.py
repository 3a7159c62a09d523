"""Pages of keys: what a few numbers about a page say of the keys in it.

Pages start at each row's first real token, so padding moves no border. Two estimates of the
largest q . k of a page, from two vectors each:

- ``minmax``: the corner of the box that holds the keys; never below the true maximum.
- ``meanstd``: the mean plus how far the page spreads along the query, channels taken as
  independent. A page of 16 random keys has a wide box whatever lies in it; its spread is narrower.

Shapes: B = batch, G = key-value heads, R = query heads of one, Q = queries, K = keys,
P = pages, D = head width.
"""

from typing import Literal

import torch
from torch import Tensor

from gossamer.kernels.page_attention import page_bounds, page_refusal
from gossamer.kernels.page_attention import page_scores as page_scores_kernel
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.memory import LayerState

__all__ = ["Scorer", "complete_pages", "page_scores", "page_summary", "remembered_pages"]

Scorer = Literal["minmax", "meanstd"]


def page_summary(pages: Tensor, scorer: Scorer) -> tuple[Tensor, Tensor]:
    """The two vectors kept of every page.

    Parameters
    ----------
    pages : (..., P, p, D), the p keys of every page.

    Returns
    -------
    (..., P, D) twice, in the keys' dtype: least and greatest of each channel, or mean and standard
    deviation.
    """
    if scorer == "minmax":
        low, high = pages.aminmax(dim=-2)
        return low, high
    exact = pages.to(torch.promote_types(pages.dtype, torch.float32))
    deviation, mean = torch.std_mean(exact, dim=-2, correction=0)
    return mean.to(pages.dtype), deviation.to(pages.dtype)


def page_scores(query: Tensor, first: Tensor, second: Tensor, scorer: Scorer) -> Tensor:
    """Estimated largest q . k of every page, summed over the heads that share keys.

    Parameters
    ----------
    query : (B, G, R, Q, D). first, second : (B, G, P, D) of :func:`page_summary`.

    Returns
    -------
    (B, G, Q, P), fp32 (fp64 for fp64 inputs).
    """
    if query.shape[3] == 1 and first.shape[2]:
        flat = query.flatten(1, 2)
        if page_refusal(flat, first, second, 1) is None:
            return page_scores_kernel(flat, first, second, scorer)[:, :, None]
    exact = torch.promote_types(query.dtype, torch.float32)
    query, first, second = query.to(exact), first.to(exact), second.to(exact)
    if scorer == "minmax":
        # sum_c max(q_c low_c, q_c high_c) = q+ . high + q- . low, so heads are summed before.
        up, down = query.clamp_min(0).sum(2), query.clamp_max(0).sum(2)
        return up @ second.transpose(2, 3) + down @ first.transpose(2, 3)
    mean = query.sum(2) @ first.transpose(2, 3)
    spread = query.square().flatten(2, 3) @ second.square().transpose(2, 3)
    spread = spread.clamp_min(0).sqrt().unflatten(2, query.shape[2:4]).sum(2)
    return mean + spread


def complete_pages(key: Tensor, start: int | Tensor, page: int, low: int, high: int) -> Tensor:
    """Pages low .. high - 1 of every row: (B, G, high - low, page, D).

    Parameters
    ----------
    key : (B, G, K, D). start : place of the first real key, of all rows or (B,) of each. Places
        beyond the keys repeat the last one: a row that has fewer pages must not read them.
    """
    batch, heads, keys, width = key.shape
    if isinstance(start, int):
        return _piece(key, start, page, low, high).unflatten(2, (high - low, page))
    place = start[:, None] + torch.arange(low * page, high * page, device=key.device)
    place = place.clamp_max(keys - 1).expand(batch, -1)[:, None, :, None]
    return key.gather(2, place.expand(-1, heads, -1, width)).unflatten(2, (-1, page))


def _piece(key: Tensor, start: int, page: int, low: int, high: int) -> Tensor:
    return key[:, :, start + low * page : start + high * page]


def _summaries(
    key: Tensor, start: int | Tensor, page: int, low: int, high: int, scorer: Scorer
) -> tuple[Tensor, Tensor]:
    """:func:`page_summary` of pages low .. high - 1 of every row; in one pass on a GPU."""
    if isinstance(start, int):
        piece = _piece(key, start, page, low, high)
        if page_refusal(piece[:, :, :1], piece, piece, page) is None:
            return page_bounds(piece, page, scorer)
    return page_summary(complete_pages(key, start, page, low, high), scorer)


def remembered_pages(
    call: Call, layout: Layout, page: int, scorer: Scorer
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Summaries of all complete pages of a call; those seen before come from its state.

    Without padding nothing waits for the device.

    Returns
    -------
    first, second : (B, G, P, D). start : place of the first real key, of all rows (0) or (B,) of
        each.
    """
    state = call.state
    start = _start(layout)
    if isinstance(start, int):
        earliest = latest = start
    else:
        earliest, latest = torch.stack(start.aminmax()).tolist()
    ends = min(layout.end - layout.key_offset, layout.keys)
    # A page is complete for good once it is complete in every row.
    settled, every = (max(0, (ends - at) // page) for at in (latest, earliest))
    if layout.key_offset or not layout.regular:
        state = LayerState()  # the first key moves from call to call
    known = min(int(state.facts.get("pages", 0)), settled)
    if settled > known:
        fresh = _summaries(call.key, start, page, known, settled, scorer)
        for name, new in zip(("first", "second"), fresh, strict=True):
            old = state.tensors.get(name)
            state.tensors[name] = new.clone() if old is None else torch.cat([old, new], dim=2)
        state.facts["pages"], state.seen = settled, settled * page
    empty = call.key[:, :, :0]
    kept = [state.tensors.get(name, empty)[:, :, :settled] for name in ("first", "second")]
    if every > settled:
        late = _summaries(call.key, start, page, settled, every, scorer)
        kept = [torch.cat([old, new], dim=2) for old, new in zip(kept, late, strict=True)]
    return kept[0], kept[1], start


def _start(layout: Layout) -> int | Tensor:
    """Place of the first real key: one number where the rows agree, which a CPU is asked for."""
    if layout.padding is None:
        return 0
    start = (layout.first - layout.key_offset).clamp_min(0)
    if start.device.type == "cpu" and bool((start == start[0]).all()):
        return int(start[0])
    return start
