"""Finding a query's best keys by an indexer: among all of them, or block by block first.

The keys of a sequence stand in their logical order here, so that blocks begin at the first real
token whatever padding precedes it. Queries are taken a few at a time: no T x T scores exist.
Shapes: B = batch, q = queries at hand, H = indexer heads, D = indexer width, P = keys in logical
order, M = candidates of a query, n = blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import topk_mask
from gossamer.core.scores.attention_estimate import block_means
from gossamer.methods.attention.indexer.module import index_scores

__all__ = ["Found", "Keys", "flat_search", "hierarchical_search"]

Sees = Callable[[Tensor], Tensor]
"""Key places (B or 1, q or 1, M) in logical order to whether the queries see them (B, q, M)."""


@dataclass(frozen=True, eq=False)
class Keys:
    """Indexer keys of some sequences.

    Parameters
    ----------
    key : (B, P, D). real : bool, (B, P), tokens there are; None for all.
    """

    key: Tensor
    real: Tensor | None = None

    def means(self, block: int) -> Tensor:
        """(B, n, D): the mean key of every block; of a last, short one over what it holds."""
        return block_means(self.key, block, self.real)


@dataclass(frozen=True, eq=False)
class Found:
    """Chosen keys of some queries.

    Parameters
    ----------
    place : int64, (B, q, M), ascending within a query. kept : bool, (B, q, M), chosen among them.
    scored : query-key scores computed for each query, block means included.
    """

    place: Tensor
    kept: Tensor
    scored: int


def _best(score: Tensor, seen: Tensor, keep: int) -> Tensor:
    """The ``keep`` best of what is seen in every row, ties to the lower place."""
    ranked = score.masked_fill(~seen, -torch.inf).flatten(0, 1)
    return topk_mask(ranked, keep).view(score.shape) & seen


def flat_search(query: Tensor, weight: Tensor, keys: Keys, sees: Sees, keep: int) -> Found:
    """Score every key, keep the best.

    Parameters
    ----------
    query : (B, q, H, D). weight : (B, q, H). keep : keys of a query; all it sees if fewer.
    """
    batch, count = query.shape[:2]
    length = keys.key.shape[1]
    place = torch.arange(length, device=query.device).expand(batch, count, length)
    score = index_scores(query, weight, keys.key)
    return Found(place, _best(score, sees(place), keep), length)


def hierarchical_search(
    query: Tensor,
    weight: Tensor,
    keys: Keys,
    means: Tensor,
    at: Tensor,
    sees: Sees,
    keep: int,
    *,
    block: int,
    blocks: int,
) -> Found:
    """Score block means, then the keys of the best blocks; keep the best keys.

    The first block and the query's own are always among the best; others count only when all of
    their keys stand before the query, so that a mean holds nothing from the future.

    Parameters
    ----------
    means : (B, n, D). at : (B or 1, q), places of the queries. block : keys of a block.
    blocks : blocks whose keys are scored, at least 2.
    """
    batch, count = query.shape[:2]
    number = torch.arange(means.shape[1], device=query.device)
    own = (at // block)[..., None]
    score = index_scores(query, weight, means)
    forced = (number == own) | (number == 0)
    score = score.masked_fill(forced, torch.inf)
    chosen = _best(score, (number <= own).expand_as(score), blocks)
    # The chosen blocks in ascending order; rows that have fewer end in a block beyond the last.
    beyond = means.shape[1]
    listed = torch.where(chosen, number, beyond).sort(-1).values[..., :blocks]
    inside = torch.arange(block, device=query.device)
    place = (listed[..., None] * block + inside).flatten(2)
    length = keys.key.shape[1]
    there = place < length
    place = place.clamp_max(length - 1)
    width = keys.key.shape[-1]
    wanted = place.flatten(1)[..., None].expand(-1, -1, width)
    own_keys = keys.key.gather(1, wanted).view(batch, count, -1, width)
    score = index_scores(query, weight, own_keys)
    kept = _best(score, there & sees(place), keep)
    return Found(place, kept, means.shape[1] + place.shape[2])
