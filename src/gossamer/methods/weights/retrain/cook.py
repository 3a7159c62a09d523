"""Cook: retrain copies of a masked network and average them; one phase of a soup."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

from torch import nn

from gossamer.methods.weights.retrain.masks import Masks
from gossamer.methods.weights.retrain.states import average, copy_of, greedy, put_back

__all__ = ["Cooked", "Rule", "cook", "phases_of"]

Rule = Literal["uniform", "greedy"]


@dataclass(frozen=True)
class Cooked:
    """What one phase gave.

    Parameters
    ----------
    members : score of every copy, higher is better. soup : the average's score.
    chosen : copies in the average, in the order they were taken in.
    """

    members: tuple[float, ...]
    soup: float
    chosen: tuple[int, ...]

    @property
    def best(self) -> float:
        """Score of the best copy."""
        return max(self.members)

    @property
    def mean(self) -> float:
        """Mean score of the copies."""
        return sum(self.members) / len(self.members)


def phases_of(sparsity: float, phases: int) -> list[float]:
    """Sparsities of the phases: each removes the same share of what is left.

    The last is ``sparsity`` itself. Source: iterative magnitude pruning, arXiv 1506.02626.
    """
    steps = range(1, phases)
    return [*(1.0 - (1.0 - sparsity) ** (step / phases) for step in steps), sparsity]


def cook(
    model: nn.Module,
    masks: Masks,
    copies: int,
    train: Callable[[int], object],
    score: Callable[[], float],
    *,
    rule: Rule = "uniform",
    refresh: Callable[[], object] | None = None,
) -> Cooked:
    """Retrain copies of a model under one mask, average them, and leave the soup in the model.

    Parameters
    ----------
    model : pruned; every copy starts from its present state.
    masks : parameter path to bool mask; every copy is checked to be zero outside.
    train : trains the model in place as copy number i.
    score : of the model as it stands, on validation data, higher is better; NaN counts as worst.
    rule : ``uniform`` averages all copies, ``greedy`` those that help.
    refresh : run after every averaging, such as measuring batch norm's statistics anew.
    """
    start = copy_of(model)
    states, members = [], []

    def value() -> float:
        found = score()
        return found if isfinite(found) else -inf

    for index in range(copies):
        put_back(model, start)
        train(index)
        states.append(copy_of(model))
        members.append(value())

    def of(state: dict) -> float:
        put_back(model, state)
        if refresh is not None:
            refresh()
        return value()

    if rule == "greedy":
        found = greedy(states, of, scores=members, masks=masks)  # type: ignore[arg-type]
        state, chosen = found.state, found.chosen
    else:
        state, chosen = average(states, masks=masks), tuple(range(copies))
    return Cooked(tuple(members), of(state), chosen)
