"""SR-STE: train dense weights through an N:M mask, and pull what it hides towards zero."""

from dataclasses import dataclass
from typing import ClassVar

from gossamer.core import Card, check_count
from gossamer.methods.training.base import check_share
from gossamer.methods.training.nm.adam import Decay
from gossamer.methods.training.nm.base import BehindMask

__all__ = ["SRSTE"]


@dataclass(frozen=True, kw_only=True)
class SRSTE(BehindMask):
    """Compute with the N largest weights of every M, train all of them, and let the rest decay.

    Parameters
    ----------
    pull : λ of the decay on removed weights, added to the gradient. 2e-4 is the paper's with
        SGD; 0 is the plain straight-through estimator. Adam divides it by the size of the
        gradients, so there the same number pulls much harder where gradients are small.
    every : updates between choices of the masks.

    Source: arXiv 2102.04010, §3.2, eq. 8 (Sparse-refined straight-through estimator).

    Departs from the paper: groups run along the inputs of matrices; convolutions are refused.
    """

    card: ClassVar[Card] = Card(
        title="Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
        year=2021,
        arxiv="2102.04010",
        family="training",
        when="during training",
        start="dense to sparse",
        masks="dynamic",
        site="linear weight",
        score="|w| of the dense weights",
        pattern="N:M",
        budget="N of M, or any allocation with N varying by layer",
        schedule="masks chosen anew at every update",
        update="straight-through gradient and a decay of removed weights",
        kernel="masked dense",
        departs="no convolutions",
    )

    pull: float = 2e-4
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("pull", self.pull)
        check_count("every", self.every, 1)

    def refreshes(self, t: int) -> bool:
        return t % self.every == 0

    def removed_share(self, t: int) -> float:
        return 0.0

    def decay(self, t: int, lr: float) -> Decay | None:
        """λ (1 - M) w in the gradient."""
        return Decay(self.pull) if self.pull else None
