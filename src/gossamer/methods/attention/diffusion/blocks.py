"""SparseD's choice of key blocks: the mean attention of a tile, prompt and generation apart.

Shapes: B = batch, H = heads, Q = queries, K = keys, D = head width, w = block, n = key blocks.
"""

import torch
from torch import Tensor

from gossamer.core import topk_mask
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout

__all__ = ["everything", "first_generated", "keep_isolated", "tile_means"]


def everything(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The rule of a bidirectional model: every token sees every token."""
    return (query >= 0) & (key >= 0)


def tile_means(call: Call, layout: Layout, block: int) -> Tensor:
    """Mean attention probability of every tile of w queries by w keys.

    The softmax runs over all keys, with the call's own scale, in fp32 or better; scores exist for
    one block of queries at a time. In ragged last tiles the mean is over the pairs there are;
    queries that are padding do not count.

    Returns
    -------
    (B, H, ceil(Q / w), n).
    """
    query, key = call.grouped_query(), call.key.to(call.exact)
    batch, heads, queries = call.query.shape[:3]
    real = layout.padding
    width = torch.full((-(-layout.keys // block),), block, device=key.device)
    width[-1] = layout.keys - block * (len(width) - 1)
    rows = []
    for start in range(0, queries, block):
        part = slice(start, min(start + block, queries))
        score = torch.einsum("bgrqd,bgkd->bgrqk", query[:, :, :, part].to(call.exact), key)
        score = score.flatten(1, 2) * call.factor
        if real is not None:
            score = score.masked_fill(~real[:, None, None], -torch.inf)
        share = torch.softmax(score, dim=-1).nan_to_num(0.0)
        if real is not None:
            share = share * real[:, None, part, None]
        column = torch.nn.functional.pad(share.sum(2), (0, len(width) * block - layout.keys))
        tile = column.view(batch, heads, len(width), block).sum(-1)
        rows.append(tile / (width * (part.stop - part.start)))
    return torch.stack(rows, dim=2)


def first_generated(prompt: int, tokens: int, block: int) -> int:
    """Number of the first key block that counts as generation.

    That is the first without a prompt token, or the last block where there is none.

    >>> first_generated(prompt=10, tokens=32, block=8), first_generated(10, 14, 8)
    (2, 1)
    """
    return min(-(-prompt // block), -(-tokens // block) - 1)


def keep_isolated(score: Tensor, first: int, share: float) -> Tensor:
    """Keep 1 + floor(share * n) key blocks of the prompt, and as many by that rule of the rest.

    Ranking the two apart keeps a few sure prompt blocks from taking the places of blocks that
    are still being written.

    Parameters
    ----------
    score : (..., n). first : number of the first generated block, 0 to n; at 0 or n one ranking
        is left. share : fraction of the blocks to keep, 0 to 1.

    Returns
    -------
    bool, (..., n). Ties go to the lower block.
    """
    kept: list[Tensor] = []
    for part in (score[..., :first], score[..., first:]):
        blocks = part.shape[-1]
        # Room for rounding: 0.3 of 10 blocks are 3.
        keep = 1 + int(share * blocks + 1e-9)
        kept.append(topk_mask(part.flatten(0, -2), keep).view(part.shape))
    return torch.cat(kept, dim=-1)
