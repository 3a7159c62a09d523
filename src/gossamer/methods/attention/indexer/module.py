"""The indexer of DeepSeek sparse attention: a few small heads that score every key for a query.

I(t, s) = sum_h w(t, h) * ReLU(q(t, h) . k(s) / sqrt(D)), one key for all heads.
Shapes: B = batch, Q = queries, K = keys, H = indexer heads, D = indexer width, C = model width.
"""

import torch
from torch import Tensor, nn

__all__ = ["Indexer", "index_scores", "rotate"]


def index_scores(query: Tensor, weight: Tensor, key: Tensor) -> Tensor:
    """Scores of keys, fp32.

    Parameters
    ----------
    query : (B, Q, H, D). weight : (B, Q, H). key : (B, K, D), or (B, Q, K, D) where every query
        has keys of its own.

    Returns
    -------
    (B, Q, K).
    """
    width = query.shape[-1]
    form = "bqhd,bkd->bqhk" if key.dim() == 3 else "bqhd,bqkd->bqhk"
    product = torch.einsum(form, query.float(), key.float()) * width**-0.5
    return torch.einsum("bqh,bqhk->bqk", weight.float(), product.relu())


def rotate(tensor: Tensor, position: Tensor, width: int, base: float = 10_000.0) -> Tensor:
    """Turn the first ``width`` channels by position: half-split rotary embedding.

    Parameters
    ----------
    tensor : (B, Q, ..., D). position : (B or 1, Q), from 0; padding may hold anything.
    """
    half = width // 2
    steps = torch.arange(half, device=tensor.device, dtype=torch.float32)
    angle = position[..., None].float() * base ** (-steps / half)
    angle = angle.view(*position.shape, *[1] * (tensor.dim() - 3), half)
    cos, sin = angle.cos(), angle.sin()
    one, two, rest = tensor[..., :half], tensor[..., half:width], tensor[..., width:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)


class Indexer(nn.Module):
    """Queries, head weights and keys of one layer's indexer, from the attention module's input.

    Parameters
    ----------
    model_width : C. heads : H. width : D, even; half of the channels are rotated by position.
    """

    def __init__(self, model_width: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.query = nn.Linear(model_width, heads * width, bias=False)
        self.key = nn.Linear(model_width, width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.weight = nn.Linear(model_width, heads, bias=False)

    def queries(self, hidden: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, Q, H, D) and head weights (B, Q, H) of hidden states (B, Q, C)."""
        hidden = hidden.to(self.query.weight.dtype)
        query = self.query(hidden).unflatten(-1, (self.heads, self.width))
        weight = self.weight(hidden) * self.heads**-0.5
        return rotate(query, position, self.width // 2), weight

    def keys(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Keys (B, K, D) of hidden states (B, K, C)."""
        key = self.norm(self.key(hidden.to(self.key.weight.dtype)))
        return rotate(key, position, self.width // 2)
