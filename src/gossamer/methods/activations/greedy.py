"""Split one block's sparsity over its inputs by the error each step does to the block's output.

Steps of equal weight count are given one by one to the input where they hurt least, until the
size-weighted mean reaches the target. Source: TEAL, arXiv 2408.14690, algorithm 1.
"""

import heapq
from collections.abc import Callable, Mapping
from math import fsum, inf

from gossamer.core import GossamerError

__all__ = ["greedy_shares", "weighted_mean"]

Error = Callable[[Mapping[str, float]], float]


def weighted_mean(shares: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Mean of the sparsities, weighted by the weights each input reads."""
    return fsum(shares[n] * sizes[n] for n in shares) / fsum(sizes[n] for n in shares)


def greedy_shares(
    sizes: Mapping[str, int],
    sparsity: float,
    error: Error,
    *,
    step: float = 0.05,
    unit: int | None = None,
) -> dict[str, float]:
    """Sparsity per input whose weighted mean is ``sparsity``.

    Parameters
    ----------
    sizes : weights read through each input.
    error : distance of the block's output from dense, given a sparsity per input.
    step : sparsity one step adds to an input of size ``unit``; an input of size n gets
        ``step * unit / n``, at most up to 1. The last step is cut to meet the target.
    unit : size of the reference matrix; the smallest by default.

    Inputs are measured again lazily: each waits with the growth of squared error seen when it
    was last tried, only the most promising is tried again, and it is taken when it still is.
    Squared errors of different inputs add up almost freely, so the choices are nearly always
    those of trying all of them every round, at about two trials a round instead of seven.
    A uniform split is kept when it happens to end with the smaller error.

    Raises
    ------
    GossamerError
        Unless 0 < step <= 1.
    """
    if not 0.0 < step <= 1.0:
        raise GossamerError(f"step is {step!r}; it is a share of a matrix, so 0 < step <= 1")
    shares = dict.fromkeys(sizes, 0.0)
    total = fsum(sizes.values())
    goal = sparsity * total
    unit = unit or min(sizes.values())
    steps = {name: min(1.0, step * unit / size) for name, size in sizes.items()}
    order = {name: place for place, name in enumerate(sizes)}

    def raised(name: str) -> dict[str, float]:
        left = goal - fsum(shares[n] * sizes[n] for n in shares)
        amount = min(steps[name], 1.0 - shares[name], left / sizes[name])
        return {**shares, name: shares[name] + amount}

    base, turn = 0.0, 0
    # Entries: growth of squared error per weight removed, place, name, turn and error when tried.
    queue: list[tuple[float, int, str, int, float]] = [
        (-inf, order[name], name, -1, 0.0) for name in sizes
    ]
    # Less than rounding error is no step.
    while goal - fsum(shares[n] * sizes[n] for n in shares) > 1e-12 * total:
        growth, place, name, tried, found = heapq.heappop(queue)
        trial = raised(name)
        if tried != turn:
            gain = (trial[name] - shares[name]) * sizes[name]
            found = error(trial)
            heapq.heappush(queue, ((found**2 - base**2) / gain, place, name, turn, found))
            continue
        shares, base, turn = trial, found, turn + 1
        if shares[name] < 1.0 - 1e-12:
            heapq.heappush(queue, (growth, place, name, -1, found))
    even = dict.fromkeys(sizes, sparsity)
    return even if error(even) < base else shares
