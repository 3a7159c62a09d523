"""Which keys of a prompt its last queries read.

Shapes: B = batch, G = key-value heads, R = query heads of one, W = queries observed, P = keys of
the prompt, K = keys of the call.
"""

from typing import Any

import torch
from torch import Tensor

from gossamer.core.scores.attention_estimate import last_query_weights
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout, causal_rule

__all__ = ["keep_equal", "keep_over_heads", "observed_mass", "remember_queries", "windowed"]


def remember_queries(call: Call, layout: Layout, window: int) -> None:
    """Keep the latest queries of a prompt, given at once or in chunks, in the call's state."""
    state, new = call.state, call.query[:, :, -window:]
    old = state.tensors.get("queries")
    if old is not None and state.facts.get("end") == layout.query_offset:
        new = torch.cat([old, new], dim=2)[:, :, -window:]
    # Cloned: a slice would keep all queries of the prompt.
    state.tensors["queries"] = new.clone()
    state.facts["end"] = layout.end


def observed_mass(
    call: Call, layout: Layout, query: Tensor, end: int, pool: int, reduce: str = "mean"
) -> Tensor:
    """Attention that the last queries of a prompt give each of its keys, pooled over neighbours.

    Parameters
    ----------
    query : (B, H, W, D), the queries at absolute places end - W .. end - 1. end : P, length of the
        prompt. pool : odd width of the pooling; 1 for none. reduce : ``mean`` or ``max`` over it.

    Returns
    -------
    (B, G, P), sums over the observed queries that are no padding, means over the heads that share
    keys; 0 at padding.
    """
    shared, repeat = call.groups
    batch, _, window, width = query.shape
    at = torch.arange(end - window, end, device=query.device).view(1, 1, -1, 1)
    of = torch.arange(end, device=query.device).view(1, 1, 1, -1)
    seen = of <= at
    if layout.padding is not None:
        real = layout.padding[:, None, None]
        seen = seen & real[..., :end] & real[..., end - window : end].transpose(2, 3)
    grouped = query.view(batch, shared, repeat, window, width)
    weights = last_query_weights(grouped, call.key[:, :, :end], call.factor, seen, call.softcap)
    mass = weights.sum(2)
    if pool > 1:
        if reduce == "max":
            mass = torch.nn.functional.max_pool1d(mass, pool, 1, pool // 2)
        else:
            mass = torch.nn.functional.avg_pool1d(mass, pool, 1, pool // 2)
    if layout.padding is not None:
        mass = mass * layout.padding[:, None, :end]
    return mass


def keep_equal(mass: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """The best candidates of every head, the same number for each.

    Parameters
    ----------
    mass : (B, G, P). candidates : bool, (B or 1, 1, P). count : int64, (B or 1,).

    Returns
    -------
    bool, (B, G, P).
    """
    score = mass.masked_fill(~candidates, -1.0)
    top = score.topk(min(int(count.max()), score.shape[2]), dim=-1).indices
    rank = torch.arange(top.shape[2], device=top.device)
    chosen = (rank < count.view(-1, 1, 1)).expand_as(top)
    return torch.zeros_like(score, dtype=torch.bool).scatter(2, top, chosen) & candidates


def keep_over_heads(mass: Tensor, candidates: Tensor, count: Tensor, floor: float) -> Tensor:
    """The best candidates of all heads together; a share of its equal part is every head's own.

    Parameters
    ----------
    count : (B or 1,), keys per head on average. floor : share of them no head falls below, 0 to 1.
        Others as in :func:`keep_equal`.

    Returns
    -------
    bool, (B, G, P); each row keeps G * count keys, unless there are fewer.
    """
    heads, length = mass.shape[1:]
    own = keep_equal(mass, candidates, (floor * count).long())
    # What a head has for sure ranks before everything else.
    flat = mass.masked_fill(own, torch.inf).flatten(1)[:, None]
    wide = candidates.expand(-1, heads, -1).flatten(1)[:, None]
    return keep_equal(flat, wide, heads * count).view(-1, heads, length)


def windowed(layer: Any, layout: Layout) -> bool:
    """Whether a cache's layer has a window of its own: such a layer forgets keys by itself."""
    ruled = not layout.causal and layout.rule is not causal_rule
    return ruled or not layout.regular or getattr(layer, "is_sliding", False)
