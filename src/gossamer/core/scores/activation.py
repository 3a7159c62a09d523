"""Scores that look at what flows through a weight or channel.

Shapes: O = out features, I = in features, T = tokens.
"""

import torch
from torch import Tensor

__all__ = ["channel_magnitude", "outlier_share", "weight_times_input", "weighted_channel"]


def weight_times_input(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|w_ij| · ‖x_j‖₂: how much of a row's output a weight can carry.

    Parameters
    ----------
    weight : (O, I).
    input_norm : (I,), L2 norm of each input channel over the calibration tokens.

    Source: arXiv 2306.11695, eq. 1.
    """
    return weight.float().abs() * input_norm.float()


def channel_magnitude(x: Tensor) -> Tensor:
    """|x_j|, the score of an input channel for one token; x is (..., I)."""
    return x.abs()


def weighted_channel(x: Tensor, column_norm: Tensor) -> Tensor:
    """|x_j| · ‖W_:j‖₂, the error of dropping channel j if columns were orthogonal.

    Parameters
    ----------
    x : (..., I).
    column_norm : (I,).
    """
    return x.abs() * column_norm


def outlier_share(scores: Tensor, multiple: float) -> float:
    """Share of a block's scores that exceed ``multiple`` times their mean, 0 to 1.

    Parameters
    ----------
    scores : any shape, non-negative; all linear layers of one block concatenated.

    Source: arXiv 2310.05175, eq. 1.
    """
    flat = scores.reshape(-1).float()
    return float((flat > multiple * flat.mean(dtype=torch.float64)).double().mean())
