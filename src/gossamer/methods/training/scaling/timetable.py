"""When to prune, where the curve is drawn over consumed compute and not over updates.

Every pruning makes the updates after it cheaper, so when a share of all operations is spent depends
on the prunings before it. Operations are counted in dense updates: a dense one costs 1.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import floor
from typing import Literal

__all__ = ["CURVES", "Curve", "prunings", "share_of"]

Curve = Literal["cubic", "linear"]
Prunings = tuple[tuple[int, float], ...]

CURVES: Mapping[str, Callable[[float], float]] = {
    "cubic": lambda x: 1.0 - (1.0 - x) ** 3,
    "linear": lambda x: x,
}
"""Share of the sparsity reached after a share of the window, both from 0 to 1."""


def _cost(sparsity: float, fixed: float) -> float:
    """Of an update: what is never removed, and what is left of the rest."""
    return fixed + (1.0 - fixed) * (1.0 - sparsity)


def _nearest(updates: float) -> int:
    return floor(updates + 0.5)


@lru_cache(maxsize=256)
def prunings(
    steps: int, window: tuple[float, float], curve: Curve, sparsity: float, every: int, fixed: float
) -> Prunings:
    """After which updates to prune, and to which sparsity.

    All operations of the training are not known before its prunings are, nor these without them;
    the total is sought by bisection, and is met to about one update.

    Parameters
    ----------
    steps : updates of the training. window : shares of its operations between which to prune.
    every : updates between prunings; the last one, to the whole sparsity, is where the window ends.
    fixed : share of a dense update's operations that no pruning removes.

    Returns
    -------
    Pairs (update counted from 1, sparsity after it), both increasing.
    """
    low, high = 0.0, float(steps)
    while high - low > 1e-3:
        total = 0.5 * (low + high)
        found = _prunings_of(total, steps, window, curve, sparsity, every, fixed)
        spent = steps * share_of(found, steps, fixed)
        low, high = (total, high) if spent > total else (low, total)
    return _prunings_of(high, steps, window, curve, sparsity, every, fixed)


def _prunings_of(
    total: float,
    steps: int,
    window: tuple[float, float],
    curve: Curve,
    sparsity: float,
    every: int,
    fixed: float,
) -> Prunings:
    """The prunings of a training that spends so many operations in all."""
    if not sparsity:
        return ()
    start, end = window[0] * total, window[1] * total
    update = max(1, _nearest(start))  # dense until then
    spent, reached = float(update), 0.0
    found: list[tuple[int, float]] = []
    while update < steps and (left := _nearest((end - spent) / _cost(reached, fixed))) > 0:
        share = (spent - start) / (end - start)
        # Never back: the first update alone may reach beyond a window that begins with it.
        wanted = max(reached, sparsity * CURVES[curve](min(max(share, 0.0), 1.0)))
        if wanted > reached:
            reached = wanted
            found.append((update, wanted))
        ahead = min(every, left, steps - update)
        update, spent = update + ahead, spent + ahead * _cost(reached, fixed)
    return (*found, (min(update, steps), sparsity))


def share_of(found: Prunings, steps: int, fixed: float = 0.0) -> float:
    """Operations of a training with these prunings, over those of a dense one of equal length."""
    spent, before, sparsity = 0.0, 0, 0.0
    for update, wanted in (*found, (steps, 1.0)):
        spent += (update - before) * _cost(sparsity, fixed)
        before, sparsity = update, wanted
    return spent / steps
