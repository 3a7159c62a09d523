"""Marks: how well a ranking of heads finds those that matter.

Shapes: A = heads.
"""

from dataclasses import dataclass

from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["Marks", "area_under_curve", "mark", "true_heads"]


@dataclass(frozen=True)
class Marks:
    """A set of heads against the truth.

    Parameters
    ----------
    precision : share of the found heads that matter. recall : share of those that matter which
        were found. auc : area under the ROC curve of the ranking, 0.5 by chance.
    """

    precision: float
    recall: float
    auc: float


def true_heads(effects: Tensor, share: float = 0.1) -> Tensor:
    """Heads whose ablation costs more than a share of what the worst ablation costs: bool."""
    return effects > share * effects.max()


def area_under_curve(scores: Tensor, truth: Tensor) -> float:
    """Chance that a head that matters outranks one that does not; ties count half.

    Raises
    ------
    GossamerError
        If all heads matter or none does.
    """
    scores, truth = scores.flatten(), truth.flatten()
    good, bad = scores[truth], scores[~truth]
    if not len(good) or not len(bad):
        raise GossamerError(
            f"{len(good)} of {len(truth)} heads matter; a ranking needs some that do and some "
            "that do not"
        )
    above = (good[:, None] > bad).double() + 0.5 * (good[:, None] == bad).double()
    return float(above.mean())


def mark(scores: Tensor, truth: Tensor, found: Tensor) -> Marks:
    """Marks of a ranking (A,) and of the heads (bool) chosen from it."""
    hits = float((found & truth).sum())
    return Marks(
        precision=hits / max(1, int(found.sum())),
        recall=hits / max(1, int(truth.sum())),
        auc=area_under_curve(scores, truth),
    )
