"""The definition of N:M selection, in torch operations, for any device and real dtype."""

from torch import Tensor

from gossamer.core.rank import check_scores, topk_mask

__all__ = ["nm_mask_reference"]


def nm_mask_reference(groups: Tensor, keep: int) -> Tensor:
    """Keep the ``keep`` largest entries of each row, ties to the lower index.

    Parameters
    ----------
    groups : (G, M), any real dtype. keep : 0 < keep <= M.

    Returns
    -------
    bool, (G, M).

    Raises
    ------
    GossamerError
        On NaN.
    """
    check_scores(groups)
    return topk_mask(groups, keep)
