"""Split a sparsity over blocks by what each block's sparsity does to the model's output.

TEAL gives all blocks one target. Here every block is tried alone at several sparsities, and the
budget goes where it costs least. Errors of blocks are taken to add up, and to follow a power of
the sparsity between two measured points.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import fsum, log

__all__ = ["across", "grid_of", "hull", "refined"]

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


def refined(points: Sequence[Point], step: float = 0.01) -> list[Point]:
    """The measured points and those between, from (0, 0), on powers of the sparsity.

    Straight lines would put a kink at every measured point, and every budget on one.

    Parameters
    ----------
    points : (sparsity, error), sparsities above 0.
    """
    found = sorted((s, max(e, 1e-12)) for s, e in points)
    result: list[Point] = [(0.0, 0.0)]
    start = 0.0
    for index, (high, error) in enumerate(found):
        # Below the first point, the power between the first two goes on.
        low, base = found[max(0, index - 1)] if index else found[min(1, len(found) - 1)]
        power = log(error / base) / log(high / low) if high != low else 1.0
        count = max(1, round((high - start) / step))
        for k in range(1, count + 1):
            at = start + (high - start) * k / count
            result.append((at, error * (at / high) ** max(power, 0.0)))
        start = high
    return result


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def across(
    curves: Mapping[int, Sequence[Point]], sizes: Mapping[int, float], sparsity: float
) -> dict[int, float]:
    """Sparsity per block with the least sum of errors whose weighted mean is ``sparsity``.

    Parameters
    ----------
    curves : per block, measured (sparsity, error), see :func:`refined`.
    sizes : weights of each block.

    The cheapest segments of all convex hulls are taken until the budget is met, the last in
    part. What no curve reaches is given to all blocks alike.
    """
    segments = []
    for block, points in curves.items():
        corners = hull(refined(points))
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
