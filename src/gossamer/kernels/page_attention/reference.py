"""Paged decoding by definition, in float64.

Shapes: B = batch, H = heads, G = key-value heads, R = H / G, P = pages, p = keys of a page,
K = keys, D, E = head widths of queries and values.
"""

from typing import Literal

import torch
from torch import Tensor

from gossamer.kernels.block_attention.reference import masked_attention

__all__ = [
    "Scorer",
    "choose_reference",
    "page_attention_reference",
    "page_bounds_reference",
    "page_scores_reference",
]

Scorer = Literal["minmax", "meanstd"]


def page_bounds_reference(key: Tensor, page: int, scorer: Scorer) -> tuple[Tensor, Tensor]:
    """Two vectors of every whole page, (B, G, P, D) in the keys' dtype."""
    pages = key[:, :, : key.shape[2] // page * page].unflatten(2, (-1, page))
    if scorer == "minmax":
        low, high = pages.aminmax(dim=3)
        return low, high
    deviation, mean = torch.std_mean(pages.double(), dim=3, correction=0)
    return mean.to(key.dtype), deviation.to(key.dtype)


def page_scores_reference(query: Tensor, first: Tensor, second: Tensor, scorer: Scorer) -> Tensor:
    """(B, G, P) float32: estimates of the largest q . k of a page, summed over sharing heads."""
    batch, width = len(query), query.shape[3]
    grouped = query.double().view(batch, first.shape[1], -1, 1, width)
    one, two = (x.double()[:, :, None] for x in (first, second))
    if scorer == "minmax":
        estimate = torch.maximum(grouped * one, grouped * two).sum(-1)
    else:
        estimate = (grouped * one).sum(-1) + (grouped * two).square().sum(-1).sqrt()
    return estimate.sum(2).float()


def choose_reference(score: Tensor, keep: int) -> Tensor:
    """(B, G, keep) pages, ascending: the best of (B, G, P) scores, and page P, still unscored.

    Of equal scores the earlier pages are taken.
    """
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., : keep - 1]
    own = torch.full_like(order[..., :1], score.shape[-1])
    if keep == 1:
        return torch.full((*score.shape[:2], 1), score.shape[-1], device=score.device)
    return torch.cat([order, own], dim=-1).sort(-1).values


def page_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    page: int,
    *,
    end: int | None = None,
    first: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition of ``page_attention``, whose arguments it takes."""
    from gossamer.kernels.block_attention.reference import block_mask

    keys = key.shape[2]
    mask = block_mask(
        *(indptr, indices, (1, page), 1, keys), first=first, query_offset=(end or keys) - 1
    )
    return masked_attention(query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks)
