"""Top-k keys by a tree: score one key of every stretch, keep the best stretches, halve them.

Looks at about 2 k log2(T / k) of the T keys. It finds the best keys only where keys close
together score alike, since one key stands for its stretch.
Shapes: B = batch, G = key-value heads, n = query blocks, r = queries that speak for a block,
K = keys, D = head width, k = stretches kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Found", "tree_top_blocks"]

_GATHERED = 1 << 25
"""Elements of keys collected at once."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Parameters
    ----------
    blocks : (B, G, n, k) key blocks, ascending, then -1.
    products : (n,) dot products of one query per block of queries, over all levels.
    """

    blocks: Tensor
    products: Tensor


def tree_top_blocks(
    query: Tensor,
    place: Tensor,
    key: Tensor,
    begin: Tensor,
    keep: int,
    size: int = 1,
) -> Found:
    """The key blocks that a tree search finds best for every block of queries.

    Parameters
    ----------
    query : (B, G, n, r, D), queries that speak for their block: the largest of their scores
        counts. place : (n, r), the key each of them stands at; it sees none after.
    key : (B, G, K, D). begin : (B or 1,), first key that is no padding.
    keep : blocks kept. size : keys of a block.

    Each search covers the blocks from ``begin`` to the last place of its queries: first ``keep``
    stretches of equal length; then every stretch is halved, a half is scored by its middle key,
    and the best ``keep`` halves stay, until each is one block.

    Source: arXiv:2406.09827, Algorithm 1.
    """
    batch, shared, rows = query.shape[:3]
    reach = place.amax(1) // size + 1
    # Blocks of queries that are padding search their own block.
    low = torch.minimum(begin[:, None] // size, reach - 1)
    span = reach - low
    keep = min(keep, int(span.max()))
    step = max(1, _GATHERED // max(1, batch * shared * 2 * keep * key.shape[3]))
    blocks, products = [], []
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        found = _search(
            query[:, :, part], place[part], key, low[:, part], span[:, part], keep, size
        )
        blocks.append(found.blocks)
        products.append(found.products)
    return Found(torch.cat(blocks, dim=2), torch.cat(products))


def _search(
    query: Tensor, place: Tensor, key: Tensor, low: Tensor, span: Tensor, keep: int, size: int
) -> Found:
    """:func:`tree_top_blocks` of as many query blocks as memory takes at once."""
    batch, shared, rows = query.shape[:3]
    edge = torch.arange(keep + 1, device=key.device)
    cut = low[..., None] + edge * span[..., None] // keep
    cut = cut[:, None].expand(batch, shared, rows, keep + 1)
    left, right = cut[..., :-1], cut[..., 1:]
    products = torch.zeros(rows, dtype=torch.long, device=key.device)
    for _ in range(_levels(int(span.max()), keep)):
        middle = (left + right) // 2
        left, right = torch.cat([left, middle], -1), torch.cat([middle, right], -1)
        there = right > left
        score = _scores(query, place, key, (left + right) // 2, size).masked_fill(
            ~there, -torch.inf
        )
        products += there.sum(-1).amax((0, 1))
        best = score.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
        left, right = left.gather(-1, best), right.gather(-1, best)
    blocks = torch.where(right > left, left, torch.iinfo(torch.long).max).sort(dim=-1).values
    return Found(blocks.masked_fill(blocks == torch.iinfo(torch.long).max, -1), products)


def _levels(span: int, keep: int) -> int:
    """Halvings until stretches of ``span`` blocks over ``keep`` are single blocks."""
    return max(0, math.ceil(math.log2(-(-span // keep))))


def _scores(query: Tensor, place: Tensor, key: Tensor, block: Tensor, size: int) -> Tensor:
    """(B, G, n, c): the largest score of a block's middle key with the queries that see it."""
    batch, shared, rows, count = block.shape
    at = (block * size + size // 2).clamp_max(key.shape[2] - 1)
    flat = at.reshape(batch, shared, rows * count, 1)
    spoken = key.gather(2, flat.expand(-1, -1, -1, key.shape[3]))
    spoken = spoken.view(batch, shared, rows, count, key.shape[3])
    score = (query @ spoken.transpose(-1, -2)).float()
    hidden = at[..., None, :] > place[:, :, None]
    # A stretch that no query sees in its middle still comes before one that is empty.
    return score.masked_fill(hidden, torch.finfo(score.dtype).min).amax(-2)
