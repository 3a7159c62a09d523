"""Attention among some tokens only: the others neither ask nor are read.

Shapes: B = batch, G = key-value heads (either is 1 where all agree), Q = queries, K = keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.layout import Layout

__all__ = ["SubsetIndex", "places_of"]


def places_of(chosen: Tensor) -> Tensor:
    """Places of the True entries along the last dimension, ascending, -1 behind the last.

    Parameters
    ----------
    chosen : bool, (..., n).

    Returns
    -------
    int64, (..., m), m the most there are.

    >>> places_of(torch.tensor([[True, False, True], [False, True, False]])).tolist()
    [[0, 2], [1, -1]]
    """
    counts = chosen.sum(-1)
    most = int(counts.max()) if counts.numel() else 0
    order = chosen.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
    there = torch.arange(most, device=chosen.device) < counts[..., None]
    return torch.where(there, order, -1)


@dataclass(frozen=True, eq=False)
class SubsetIndex(KeyIndex):
    """Chosen queries read the chosen keys they see; other queries read nothing and get zeros.

    Parameters
    ----------
    queries : bool, (B, G, Q). keys : bool, (B, G, K).
    """

    layout: Layout
    queries: Tensor
    keys: Tensor

    def mask(self, rows: slice | None = None) -> Tensor:
        asked = self.queries if rows is None else self.queries[..., rows]
        return self.layout.mask(rows) & asked[..., None] & self.keys[:, :, None]

    def pairs(self) -> tuple[int, int]:
        layout = self.layout
        if not layout.plain:
            return super().pairs()
        # A query reads the chosen keys up to its own.
        upto = self.keys.long().cumsum(-1)
        own = (layout.query_index - layout.key_offset).clamp_max(layout.keys - 1)
        kept = int((upto[..., own] * self.queries).sum())
        return kept, int((own + 1).sum()) * len(self.keys) * self.keys.shape[1]
