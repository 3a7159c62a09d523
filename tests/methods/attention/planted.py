"""Planted queries and keys, as the claims use them, and what tests ask of them."""

import torch
from torch import Tensor

from gossamer.claims.attention.planted import Plant, Planted, planted

__all__ = ["Plant", "Planted", "planted", "probabilities"]


def probabilities(planted: Planted) -> Tensor:
    """Causal attention weights in fp64, (G, R, T, T)."""
    shared, length, width = planted.key.shape[1:]
    query = planted.query.double().view(shared, -1, length, width)
    score = torch.einsum("grqd,gkd->grqk", query, planted.key[0].double()) * width**-0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return score.masked_fill(later, -torch.inf).softmax(-1)
