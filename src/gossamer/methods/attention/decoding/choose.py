"""From scores of keys or pages to the index of what each query reads.

Budgets are per query: a row padded on the left, or a query checked together with later ones in
assisted decoding, keeps as many keys as it would alone.
Shapes: B = batch, G = key-value heads (either is 1 where all agree), Q = queries, K = keys,
k = most keys of a query.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core import check_count
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.ranked import check_one_budget

__all__ = ["Amount", "best", "index_of", "visible"]


@dataclass(frozen=True)
class Amount:
    """How many of the keys (or pages) a query sees it reads.

    Parameters
    ----------
    sparsity : share left out; None where ``count`` says it. count : keys (or pages) read.
    least : read in any case, as far as there are so many.
    """

    sparsity: float | None
    count: int | None
    least: int = 1

    def of(self, seen: Tensor) -> Tensor:
        """Numbers kept of numbers seen, same shape: ``round((1 - sparsity) * seen)``, or count."""
        if self.count is not None:
            kept = torch.full_like(seen, self.count)
        else:
            assert self.sparsity is not None
            kept = torch.round((1.0 - self.sparsity) * seen.double()).long()
        return torch.minimum(kept.clamp_min(self.least), seen)

    def pages(self, page: int, least: int) -> "Amount":
        """The same amount in pages of so many keys."""
        count = None if self.count is None else self.count // page
        return Amount(self.sparsity, count, least)

    @staticmethod
    def check(method: Any) -> None:
        """Fill in a default sparsity, then insist on exactly one budget.

        Raises
        ------
        GossamerError
            If both or neither of ``sparsity`` and ``budget_tokens`` are given.
        """
        if method.sparsity is None and method.budget_tokens is None:
            object.__setattr__(method, "sparsity", 0.5)
        check_one_budget(method.sparsity, method.budget_tokens)
        if method.budget_tokens is not None:
            check_count("budget_tokens", method.budget_tokens, 1)


def visible(layout: Layout) -> Tensor:
    """(B, Q) keys each query of a short call sees."""
    if layout.plain:
        return (layout.query_index + 1 - layout.key_offset).clamp_max(layout.keys)[None]
    return layout.mask().sum(-1)[:, 0]


def best(score: Tensor, layout: Layout, amount: Amount, local: int = 1) -> Tensor:
    """Places of the best visible keys of every query, from the call's first key.

    Parameters
    ----------
    score : (B, G, Q, K). amount : how many each query reads.
    local : latest keys read whatever their score, the query's own among them.

    Returns
    -------
    int64, (B, G, Q, k), -1 where a query reads fewer; best first. Equal scores: any of them, as
    ``torch.topk`` has it, for it sorts nothing else.
    """
    seen = layout.mask()
    age = layout.query_index.view(1, 1, -1, 1) - layout.key_index
    score = score.masked_fill((age < local) & (age >= 0), torch.inf)
    score = score.masked_fill(~seen, -torch.inf)
    keep = amount.of(visible(layout))
    top = score.topk(min(int(keep.max()), layout.keys), dim=-1)
    rank = torch.arange(top.indices.shape[-1], device=score.device)
    kept = (rank < keep[:, None, :, None]) & (top.values > -torch.inf)
    return torch.where(kept, top.indices, -1)


def index_of(layout: Layout, place: Tensor, width: int = 1) -> BlockIndex:
    """The index that reads keys, or aligned pages of keys, at given places.

    Parameters
    ----------
    place : int64, (B, G, Q, k), key or page numbers from the call's first key, any order, none
        twice; -1 for none. width : keys of a page; 1 for single keys.
    """
    beyond = layout.keys + 1
    ordered = torch.where(place < 0, beyond, place).sort(-1).values
    counts = (place >= 0).sum(-1)
    ends = counts.flatten().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]]).view(counts.shape)
    indptr = torch.cat([starts, ends.view(counts.shape)[..., -1:]], dim=-1)
    return BlockIndex(layout, (1, width), indptr, ordered[ordered < beyond])
