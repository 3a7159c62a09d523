"""How many tokens a prompt can spare, and which, by what its last queries attend to.

Shapes: B = batch, G = key-value heads, P = tokens before the window.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["spared", "token_scores"]


def token_scores(weights: Tensor, kernel: int, real: Tensor) -> Tensor:
    """Share of the window's attention that each earlier token receives, smoothed over neighbours.

    Parameters
    ----------
    weights : (B, G, P), attention of the last queries, their mean. kernel : odd, tokens of the
        moving average. real : bool, (B or 1, P), tokens that are no padding and not in the window;
        others neither give nor take.

    Returns
    -------
    (B, G, P); sums to 1 over each head's tokens (0 where nothing is attended).
    """
    outside = ~real[:, None]
    smooth = functional.avg_pool1d(
        weights.masked_fill(outside, 0.0), kernel, stride=1, padding=kernel // 2
    ).masked_fill(outside, 0.0)
    total = smooth.sum(-1, keepdim=True)
    return smooth / total.clamp_min(torch.finfo(smooth.dtype).tiny)


def spared(score: Tensor, real: Tensor, coverage: float) -> Tensor:
    """Tokens that can go before more than ``coverage`` of the mass is lost, per row.

    Parameters
    ----------
    score : (B, G, P), sums to 1 over P. real : bool, (B, P), tokens that are no padding.

    Returns
    -------
    int64, (B,): how many of the smallest mean scores sum to less than ``coverage``.

    >>> spared(torch.tensor([[[0.7, 0.1, 0.0, 0.2]]]), torch.ones(1, 4, dtype=torch.bool), 0.25)
    tensor([2])
    """
    mean = score.mean(1).masked_fill(~real, torch.inf)
    return (mean.sort(dim=-1).values.cumsum(-1) < coverage).sum(-1)
