"""Verdicts: does a sparse model answer no worse than the dense one, task by task?

Both models answer the same samples, so samples are resampled in pairs. A method passes a task if
the paired bootstrap rejects "it loses more than the margin", with Holm's correction over all
methods and tasks tried. Tasks are never averaged: one failed task is a failed method.
Shapes: N = samples of a task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from gossamer.core import GossamerError
from gossamer.core.verdict import Paired, check_margin, holm, non_inferiority, samples_needed

__all__ = [
    "Paired",
    "TaskVerdict",
    "check_margin",
    "holm",
    "judge",
    "non_inferiority",
    "samples_needed",
]


@dataclass(frozen=True)
class TaskVerdict:
    """The verdict on one method and task.

    Parameters
    ----------
    method, task : what was compared.
    paired : the comparison.
    adjusted : its p-value after Holm's correction.
    passes : whether ``adjusted`` is at most the level.
    """

    method: str
    task: str
    paired: Paired
    adjusted: float
    passes: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "method": self.method,
            "task": self.task,
            **vars(self.paired),
            "adjusted": self.adjusted,
            "passes": self.passes,
        }


def judge(
    scores: Mapping[str, Mapping[str, ArrayLike]],
    *,
    dense: str = "dense",
    margin: float = 0.02,
    level: float = 0.05,
    draws: int = 10_000,
    seed: int = 0,
) -> list[TaskVerdict]:
    """Verdicts on every method and task.

    Parameters
    ----------
    scores : method -> task -> (N,) scores of the same samples.
    dense : the method all others are compared with.
    margin, level, draws, seed : see :func:`non_inferiority`; ``level`` bounds the chance that any
        of the passes is wrong.

    Returns
    -------
    One verdict per method but dense and task, in the order given.

    Raises
    ------
    GossamerError
        If dense, or its answers to a task, are missing.
    """
    if dense not in scores:
        raise GossamerError(f"there is no {dense!r} among {', '.join(scores)} to compare with")
    found: list[tuple[str, str, Paired]] = []
    for method, tasks in scores.items():
        for task in tasks if method != dense else ():
            if task not in scores[dense]:
                raise GossamerError(f"task {task} was not answered by {dense}")
            pair = non_inferiority(
                scores[dense][task],
                tasks[task],
                margin=margin,
                level=level,
                draws=draws,
                seed=seed,
            )
            found.append((method, task, pair))
    adjusted = holm([pair.p_value for _, _, pair in found])
    return [
        TaskVerdict(method, task, pair, p, p <= level)
        for (method, task, pair), p in zip(found, adjusted, strict=True)
    ]
