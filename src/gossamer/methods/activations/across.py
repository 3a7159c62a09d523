"""Split a sparsity over blocks by what each block's sparsity does to the model's output.

TEAL gives all blocks one target. Here every block is tried alone at several sparsities, and the
budget goes where it costs least. Errors of blocks are taken to add up.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import fsum

__all__ = ["across", "grid_of", "hull"]

Point = tuple[float, float]  # sparsity, error


def grid_of(sparsity: float) -> tuple[float, ...]:
    """Sparsities every block is tried at: below, at, and above the target."""
    high = min(0.95, 2.0 * sparsity)
    return tuple(sorted({0.5 * sparsity, sparsity, 0.5 * (sparsity + high), high}))


def hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull, by sparsity: what mixing budgets can reach."""
    found: list[Point] = []
    for point in sorted(points):
        while len(found) >= 2 and _slope(found[-2], found[-1]) >= _slope(found[-2], point):
            found.pop()
        found.append(point)
    return found


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def across(
    curves: Mapping[int, Sequence[Point]], sizes: Mapping[int, float], sparsity: float
) -> dict[int, float]:
    """Sparsity per block with the least sum of errors whose weighted mean is ``sparsity``.

    Parameters
    ----------
    curves : per block, measured (sparsity, error); (0, 0) is added.
    sizes : weights of each block.

    The cheapest segments of all convex hulls are taken until the budget is met, the last in
    part. What no curve reaches is given to all blocks alike.
    """
    segments = []
    for block, points in curves.items():
        corners = hull([(0.0, 0.0), *points])
        for low, high in pairwise(corners):
            width = (high[0] - low[0]) * sizes[block]
            segments.append((_slope(low, high) / sizes[block], low[0], block, width))
    shares = dict.fromkeys(curves, 0.0)
    total = fsum(sizes.values())
    left = sparsity * total
    for _, _, block, width in sorted(segments):
        taken = min(width, left)
        shares[block] += taken / sizes[block]
        left -= taken
    if left > 1e-12 * total:
        room = fsum((1.0 - shares[b]) * sizes[b] for b in shares)
        shares = {b: s + (1.0 - s) * left / room for b, s in shares.items()}
    return shares
