"""The integer programme of MoA: one span a head, least influence lost, bounded mean density.

Which of the candidates each head takes is a multiple-choice knapsack. Every profiled length is an
objective of its own, because a choice that is best at one length need not be at another; the
choices that no other choice beats at all lengths are the Pareto set.
Shapes: N = profiled lengths, U = heads of all layers, C = candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from gossamer.core import GossamerError
from gossamer.methods.attention.spans.plan import round_up

__all__ = ["Candidate", "Problem", "candidates", "pareto", "solve"]

Array = np.ndarray
BETAS = tuple(step / 8 for step in range(9))
"""Shares of the length, nine as in the paper."""

_GAP = 1e-3
"""Relative gap at which the solver stops: far below the error of the influence itself."""

_NODES = 500
"""Nodes of the search tree per programme: a count, unlike a time, is the same on any machine."""


@dataclass(frozen=True)
class Candidate:
    """A span ``alpha + beta * N`` that a head may take."""

    alpha: float
    beta: float


def candidates(
    lengths: Sequence[int], block: int, betas: Sequence[float] = BETAS
) -> tuple[Candidate, ...]:
    """The spans a head may take: a grid, without those too long or gone at a profiled length.

    Alphas are steps of a quarter of the shortest length, from -1/2 to 1 of it; one block alone
    and the whole text are always there. Of candidates with the same blocks at every length the
    one that grows most is kept.

    >>> len(candidates((2048, 4096, 8192), 64))
    35
    """
    step = min(lengths) / 4
    grid = [Candidate(k * step, beta) for beta in sorted(betas, reverse=True) for k in range(-2, 5)]
    grid += [Candidate(0.0, 1.0), Candidate(float(block), 0.0)]
    found: dict[tuple[int, ...], Candidate] = {}
    for one in grid:
        spans = [one.alpha + one.beta * n for n in lengths]
        if all(0 < span <= max(n, block) for span, n in zip(spans, lengths, strict=True)):
            found.setdefault(tuple(round_up(span, block) for span in spans), one)
    return tuple(found.values())


@dataclass(frozen=True)
class Problem:
    """What the programme chooses from.

    Parameters
    ----------
    lost : (N, U, C), influence of the pairs a candidate removes. kept : (N, U, C), pairs it keeps.
    total : (N, U), pairs the head itself reads. bound : largest share of all pairs kept.
    """

    lost: Array
    kept: Array
    total: Array
    bound: float

    def losses(self, choice: Array) -> Array:
        """(N,) influence removed by a choice (U,)."""
        return self.lost[:, np.arange(len(choice)), choice].sum(1)

    def densities(self, choice: Array) -> Array:
        """(N,) share of the pairs kept by a choice."""
        return self.kept[:, np.arange(len(choice)), choice].sum(1) / self.total.sum(1)


def solve(problem: Problem, goal: int, caps: Array | None = None) -> Array | None:
    """The choice that loses least at one length under the density bound at every length.

    Parameters
    ----------
    goal : index of that length. caps : (N,) largest loss at each length, inf for none.

    Returns
    -------
    (U,) int, or None when nothing satisfies the caps.
    """
    lengths, units, options = problem.lost.shape
    size = units * options
    one_each = csr_matrix(
        (np.ones(size), (np.repeat(np.arange(units), options), np.arange(size))), (units, size)
    )
    share = problem.kept.reshape(lengths, size) / problem.total.sum(1)[:, None]
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(share, -np.inf, problem.bound)]
    # The solver's tolerances are absolute, influence is not: measure it in units of its spread.
    lost = problem.lost.reshape(lengths, size)
    unit = np.abs(lost).max(1)
    unit[unit == 0] = 1
    if caps is not None and np.isfinite(caps).any():
        bounded = np.isfinite(caps)
        limits.append(
            LinearConstraint((lost / unit[:, None])[bounded], -np.inf, (caps / unit)[bounded])
        )
    found = milp(
        lost[goal] / unit[goal],
        constraints=limits,
        integrality=np.ones(size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": _GAP, "node_limit": _NODES},
    )
    return None if found.x is None else found.x.reshape(units, options).argmax(1)


def pareto(problem: Problem, levels: int = 2) -> tuple[Array, ...]:
    """Choices that no other found choice beats at every length.

    First the best choice for each length alone; then the loss at the longest length is minimised
    under caps on the others, at ``levels`` steps strictly between their best and worst values.

    Raises
    ------
    GossamerError
        If even the shortest spans keep more than the bound.
    """
    least = problem.kept.min(2).sum(1) / problem.total.sum(1)
    if (least > problem.bound).any():
        raise GossamerError(
            f"sparsity {1 - problem.bound:g} is out of reach: the sinks and one block already keep "
            f"{least.max():.1%} of the pairs; lower the sparsity, sink or block_size, or profile "
            "longer texts"
        )
    count = len(problem.lost)
    choices = [choice for n in range(count) if (choice := solve(problem, n)) is not None]
    if count > 1 and choices:
        table = np.array([problem.losses(choice) for choice in choices])
        low, high = table.min(0), table.max(0)
        steps = [np.linspace(low[n], high[n], levels + 2)[1:-1] for n in range(count - 1)]
        for caps in product(*steps):
            choice = solve(problem, count - 1, np.array([*caps, np.inf]))
            if choice is not None:
                choices.append(choice)
    unique = {tuple(choice.tolist()): choice for choice in choices}
    return _undominated(problem, list(unique.values()))


def _undominated(problem: Problem, choices: list[Array]) -> tuple[Array, ...]:
    losses = [problem.losses(choice) for choice in choices]
    return tuple(
        choice
        for choice, mine in zip(choices, losses, strict=True)
        if not any((other <= mine).all() and (other < mine).any() for other in losses)
    )
