"""The CRATE block: one step of compression, one step of sparse coding.

Shapes: B samples, T tokens, d width, H heads, p = d / H. Tokens are rows here and columns in the
paper, so its Dᵀx is x D, and its DᵀD x is x Dᵀ D.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name

from gossamer.core import GossamerError

__all__ = ["ISTA", "MSSA", "CRATEBlock"]

_CACHES = ("past_key_values", "past_key_value", "layer_past")


class MSSA(nn.Module):
    """Multi-head subspace self-attention: one projection is query, key and value at once.

    Head k computes softmax(P Pᵀ / sqrt(p)) P with P = X U_k; a linear layer with bias joins the
    heads (in the place of [U_1 .. U_H]).

    Parameters
    ----------
    width : d. heads : H, which divides d.

    Source: arXiv 2311.13110, eq. 10 and the official code.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise GossamerError(f"heads is {heads}; give a divisor of the width {width}")
        self.heads = heads
        self.subspaces = nn.Linear(width, width, bias=False)
        self.join = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """Coordinates in every subspace, (B, T, d) to (B, H, T, p)."""
        return self.subspaces(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: Any = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, T, d) to (B, T, d).

        Parameters
        ----------
        mask : (B, 1, T, K), bool (True attends) or added to the scores; None sees all.
        causal : without a mask, a token sees itself and earlier ones.
        cache : of transformers; holds the coordinates of earlier tokens, once as key and value.
        """
        own = self.split(x)
        seen = own if cache is None else cache.update(own, own, layer)[0]
        length, keys = own.shape[2], seen.shape[2]
        if mask is not None:
            mask = mask[..., :keys]
        elif causal and 1 < length < keys:
            mask = torch.ones(length, keys, dtype=torch.bool, device=x.device).tril(keys - length)
        whole = mask is None and causal and length == keys
        joined = F.scaled_dot_product_attention(own, seen, seen, attn_mask=mask, is_causal=whole)
        return self.join(joined.transpose(1, 2).flatten(2))


class ISTA(nn.Module):
    """One step of non-negative sparse coding in a learned dictionary D, (d, d).

    ISTA(x) = ReLU(x + η (x D - x Dᵀ D) - η λ).

    Parameters
    ----------
    width : d. step : η. penalty : λ.

    Source: arXiv 2311.13110, eq. 17 and the official code.
    """

    def __init__(self, width: int, step: float = 0.1, penalty: float = 0.1) -> None:
        super().__init__()
        self.step, self.penalty = step, penalty
        self.dictionary = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.dictionary)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d), at least 0."""
        D = self.dictionary
        gradient = x @ D - (x @ D.T) @ D
        return torch.relu(x + self.step * gradient - self.step * self.penalty)


class CRATEBlock(nn.Module):
    """Z' = Z + MSSA(LN(Z)), then ISTA(LN(Z')) without a residual around it.

    Takes the place of a block of transformers: called with the same arguments, of which it reads
    the mask and the cache; positions other than those already in the tokens are not seen.

    Parameters
    ----------
    width, heads, step, penalty : of :class:`MSSA` and :class:`ISTA`.
    causal : tokens do not see later ones. layer : place among the blocks, for the cache.
    like : the block replaced; the order of its forward's arguments is followed.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        step: float = 0.1,
        penalty: float = 0.1,
        causal: bool = False,
        layer: int = 0,
        like: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.causal, self.layer = causal, layer
        self.compress_norm = nn.LayerNorm(width)
        self.compress = MSSA(width, heads)
        self.sparsify_norm = nn.LayerNorm(width)
        self.sparsify = ISTA(width, step, penalty)
        forward = self.forward if like is None else like.forward
        self._names = tuple(signature(forward).parameters)
        for name in ("attention_type", "layer_type"):
            if hasattr(like, name):
                setattr(self, name, getattr(like, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, d) to (B, T, d); further arguments as of the block replaced."""
        given = {**dict(zip(self._names[1:], args, strict=False)), **kwargs}
        cache = next((given[n] for n in _CACHES if given.get(n) is not None), None)
        compressed = hidden_states + self.compress(
            self.compress_norm(hidden_states),
            given.get("attention_mask"),
            self.causal,
            cache,
            self.layer,
        )
        return self.sparsify(self.sparsify_norm(compressed))
