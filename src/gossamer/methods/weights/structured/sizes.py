"""How large a sparse layer may be to cost what the dense layer costs.

Shapes: O = out, I = in, s = sparsity.
"""

from math import ceil, floor

from gossamer.core import GossamerError, check_sparsity

__all__ = ["doped_rank", "factorized_width", "parallel_branches", "wide_factor"]


def wide_factor(sparsity: float, sides: int = 2) -> float:
    """How much wider a layer at this sparsity may be, on both sides or on one.

    k = 1 / sqrt(1 - s) where inputs and outputs grow, 1 / (1 - s) where one of them does.
    """
    return (1.0 - check_sparsity(sparsity)) ** (-1.0 / sides)


def parallel_branches(sparsity: float) -> int:
    """Branches of Sparse Parallel, 1 / (1 - s).

    Raises
    ------
    GossamerError
        If that is no whole number.
    """
    count = 1.0 / (1.0 - check_sparsity(sparsity))
    if abs(count - round(count)) > 1e-6 * count:
        raise GossamerError(
            f"sparsity {sparsity:g} makes {count:.2f} branches; choose 1 - 1/k for a whole k, "
            "such as 0.5, 0.75, 0.9"
        )
    return round(count)


def factorized_width(in_features: int, out_features: int, sparsity: float) -> int:
    """D of Sparse Factorized, ceil(I O / ((1 - s)(I + O)))."""
    share = (1.0 - check_sparsity(sparsity)) * (in_features + out_features)
    return ceil(in_features * out_features / share - 1e-9)


def doped_rank(in_features: int, out_features: int, sparsity: float) -> int:
    """R of Sparse Doped, floor(s I O / (I + O))."""
    freed = check_sparsity(sparsity) * in_features * out_features
    return floor(freed / (in_features + out_features) + 1e-9)
