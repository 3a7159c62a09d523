"""What a schedule does not do that its reader might expect, in words for the report."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from gossamer.core import NM

if TYPE_CHECKING:
    from gossamer.methods.training.base import SparseTraining

__all__ = ["notes", "warnings"]


def warnings(method: "SparseTraining") -> list[str]:
    """That no update of a training changes masks which the method moves as a rule."""
    every = getattr(method, "every", None)
    kept = not getattr(method, "exchange", 1.0)
    if every is None or kept or method.card.masks != "dynamic" or any(_changes(method)):
        return []
    until = getattr(method, "until", None)
    end = "" if until is None else f", until {until:g} of them"
    return [
        f"no update of {method.steps} steps changes the masks: every is {every}{end}; lower every "
        "or train for more steps"
    ]


def notes(method: "SparseTraining") -> list[str]:
    """That weights go all at once, and how an N:M pattern is spread over layers."""
    found: list[str] = []
    pruning = (u for u in _changes(method) if (c := method.change(u)) and c.sparsity is not None)
    # Asking a schedule about every update takes time: no longer than until the second.
    pruned = list(islice(pruning, 2))
    if len(pruned) == 1:
        found.append(
            f"weights were due once, at update {pruned[0]} of {method.steps}; lower every to "
            "prune gradually"
        )
    if isinstance(method.pattern, NM) and method.allocation == "uniform":
        found.append(
            f"pattern {method.pattern} in every layer; with a sparsity, an allocation lets N vary"
        )
    return found


def _changes(method: "SparseTraining") -> Iterator[int]:
    """Updates after which masks change."""
    refreshes = getattr(method, "refreshes", lambda update: False)

    def moves(update: int) -> bool:
        change = method.change(update)
        if change is None or change.exchange > 0.0:
            return change is not None
        return change.sparsity is not None and change.sparsity > method.sparsity_at(update - 1)

    return (u for u in range(1, method.steps + 1) if refreshes(u) or moves(u))
