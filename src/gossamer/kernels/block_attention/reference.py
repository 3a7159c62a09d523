"""Block-sparse attention by definition: explicit softmax over a dense mask, in float64.

Shapes: B = batch, H = heads, G = key-value heads, I = lists a batch row (1, G or H), Q = queries,
K = keys, C = columns, D, E = head widths of queries and values.
"""

import torch
from torch import Tensor

__all__ = ["block_attention_reference", "block_mask", "masked_attention"]


def block_mask(
    indptr: Tensor,
    indices: Tensor,
    block: tuple[int, int],
    queries: int,
    keys: int,
    *,
    columns: Tensor | None = None,
    first: Tensor | None = None,
    query_offset: int = 0,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """The pairs that are read, bool (B or 1, I, Q, K); arguments as of ``block_attention``."""
    rows, heads, count = indptr.shape[0], indptr.shape[1], indptr.shape[2] - 1
    wide = -(-keys // block[1])
    sizes = indptr.diff(dim=-1).flatten()
    kept = torch.zeros(len(sizes), wide, dtype=torch.bool, device=indices.device)
    of = torch.repeat_interleave(torch.arange(len(sizes), device=indices.device), sizes)
    starts = torch.repeat_interleave(indptr[..., :-1].flatten(), sizes)
    begins = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    at = starts + torch.arange(len(of), device=indices.device) - begins
    kept[of, indices[at].long()] = True
    mask = kept.view(rows, heads, count, wide).repeat_interleave(block[0], 2)[:, :, :queries]
    mask = mask.repeat_interleave(block[1], 3)[..., :keys]
    if columns is not None:
        single = torch.zeros(*columns.shape[:2], keys + 1, dtype=torch.bool, device=mask.device)
        single.scatter_(2, torch.where(columns < 0, keys, columns).long(), True)
        mask = mask | single[:, :, None, :keys]
    query = (query_offset + torch.arange(queries, device=mask.device))[:, None]
    key = torch.arange(keys, device=mask.device)[None]
    own = torch.ones_like(query == key)
    if causal:
        own = own & (key <= query)
    if window is not None:
        own = own & (key > query - window)
    mask = mask & own
    if first is not None:
        mask = mask & (key >= first.view(-1, 1, 1, 1))
    return mask


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over the pairs of a mask (B or 1, 1, G or H, Q, K); rows without any give zeros."""
    heads, width = query.shape[1], query.shape[-1]
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    key = key.double().repeat_interleave(heads // key.shape[1], 1)
    value = value.double().repeat_interleave(heads // value.shape[1], 1)
    score = query.double() @ key.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        extra = sinks.double().view(1, -1, 1, 1).expand(*score.shape[:-1], 1)
        score = torch.cat([score, extra], dim=-1)
    weight = torch.softmax(score, dim=-1).nan_to_num(0.0)[..., : key.shape[2]]
    return (weight @ value).to(query.dtype)


def block_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    block: tuple[int, int],
    *,
    scale: float | None = None,
    columns: Tensor | None = None,
    first: Tensor | None = None,
    query_offset: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """The definition of ``block_attention``, whose arguments it takes. Costs Q * K."""
    mask = block_mask(
        *(indptr, indices, block, query.shape[2], key.shape[2]),
        columns=columns,
        first=first,
        query_offset=query_offset,
        window=window,
        causal=causal,
    )
    return masked_attention(query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks)
