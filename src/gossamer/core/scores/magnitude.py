"""Scores that look at the weight alone."""

import torch
from torch import Tensor

__all__ = ["lamp", "magnitude"]


def magnitude(weight: Tensor) -> Tensor:
    """|w|, the oldest score.

    Parameters
    ----------
    weight : any shape.
    """
    return weight.abs()


def lamp(weight: Tensor) -> Tensor:
    """Layer-adaptive magnitude: w² over the sum of w'² of all weights at least as large.

    The largest weight of every layer scores exactly 1, so a model-wide selection empties no
    layer, and the score does not change when the layer is rescaled. Zero weights score 0 and
    are counted in no denominator but their own.

    Parameters
    ----------
    weight : any shape, n entries.

    Returns
    -------
    float64, the same shape. The running sum is float64: float32 loses the tail of 10⁷ squares.

    Source: arXiv 2010.07611, eq. 2.
    """
    # Sorted by |w|, in the weight's own precision: half the traffic of sorting squares.
    # Ties are summed in index order, first index first: the entry that selection keeps first.
    size, order = weight.detach().reshape(-1).abs().sort(stable=True, descending=True)
    ranked = size.double().square()
    scored = (ranked / ranked.cumsum(0)).masked_fill_(ranked == 0, 0.0)
    return torch.empty_like(ranked).scatter_(0, order, scored).view(weight.shape)
