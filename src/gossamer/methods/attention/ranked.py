"""Selectors that rank every visible block of keys for every block of queries.

They look at all scores, so they save no time: they are the ceiling (true attention mass) and the
floor (chance) that cheaper estimates stand between. Blocks of 1 rank single keys.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector

__all__ = ["RankedSelector", "check_one_budget", "first_ranks", "true_mass"]

_SCORES = 1 << 25
"""Scores held at once."""


@dataclass(frozen=True)
class RankedSelector(Selector):
    """Keeps the best blocks of every block of queries."""

    block_size: int

    @abstractmethod
    def score(self, call: Call, layout: Layout, layer: int, rows: slice) -> Tensor:
        """(B, G, q, K) scores of the keys for some queries; -inf at keys they do not see."""

    @abstractmethod
    def keep(self, score: Tensor, seen: Tensor) -> Tensor:
        """Which blocks stay.

        Parameters
        ----------
        score : (B, G, r, C), of every block of keys. seen : bool, same shape, blocks with a
            visible key.
        """

    def select(self, call: Call, layout: Layout, layer: int) -> BlockIndex:
        size = self.block_size
        heads = call.query.shape[0] * call.query.shape[1]
        step = max(1, _SCORES // (heads * layout.keys * size)) * size
        kept = [
            self._part(call, layout, layer, slice(at, min(at + step, layout.queries)))
            for at in range(0, layout.queries, step)
        ]
        return BlockIndex.from_blocks(layout, torch.cat(kept, dim=2), (size, size))

    def _part(self, call: Call, layout: Layout, layer: int, rows: slice) -> Tensor:
        size = self.block_size
        score = self.score(call, layout, layer, rows)
        pad = (0, -score.shape[3] % size, 0, -score.shape[2] % size)
        score = functional.pad(score, pad, value=-torch.inf)
        grid = score.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        seen = (grid > -torch.inf).any(5).any(3)
        pooled = grid.exp().sum(5).sum(3) if size > 1 else grid[:, :, :, 0, :, 0]
        return self.keep(pooled.masked_fill(~seen, -torch.inf), seen) & seen


def true_mass(call: Call, layout: Layout, rows: slice) -> Tensor:
    """Log of the attention probability that the heads of a group give each key, averaged.

    (B, G, q, K); -inf at keys the queries do not see.
    """
    query, key = call.grouped_query()[:, :, :, rows].to(call.exact), call.key.to(call.exact)
    score = torch.einsum("bgrqd,bgkd->bgrqk", query, key) * call.factor
    if call.softcap is not None:
        score = call.softcap * torch.tanh(score / call.softcap)
    hidden = ~layout.mask(rows)
    score = score.masked_fill(hidden[:, :, None], -torch.inf)
    share = torch.softmax(score, dim=-1).nan_to_num(0.0).mean(2)
    tiny = torch.finfo(share.dtype).tiny
    return share.clamp_min(tiny).log().masked_fill(hidden, -torch.inf)


def first_ranks(score: Tensor, count: Tensor) -> Tensor:
    """The ``count`` (..., 1) largest entries of every row, ties to the lower place."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    first = torch.arange(score.shape[-1], device=score.device) < count
    return torch.zeros_like(first).scatter(-1, order, first)


def check_one_budget(sparsity: float | None, budget: int | None) -> None:
    """Exactly one of a sparsity and a number of keys must be given."""
    if (sparsity is None) == (budget is None):
        raise GossamerError(f"sparsity {sparsity} and budget_tokens {budget}: give one of the two")
