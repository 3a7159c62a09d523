"""Scores from the curvature of the layer's reconstruction error."""

from torch import Tensor

__all__ = ["obs_saliency"]


def obs_saliency(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """w_ij² / [H⁻¹]_jj: error left after the optimal update of the other weights of the row.

    Parameters
    ----------
    weight : (O, I).
    inverse_diagonal : (I,), diagonal of the inverse of H = X Xᵀ (damped), positive.

    Source: optimal brain surgeon, as used by arXiv 2301.00774, eq. 3.
    """
    return weight.float().square() / inverse_diagonal.float()
