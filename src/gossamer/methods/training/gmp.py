"""GMP: gradual magnitude pruning, fast while there is much to remove and slower towards the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card, GossamerError, check_count
from gossamer.core.schedule import Cubic
from gossamer.methods.training.base import Allocation, Change, SparseTraining, check_share

__all__ = ["GMP"]


@dataclass(frozen=True, kw_only=True)
class GMP(SparseTraining):
    """Train dense at first, and remove the smallest weights along a cubic curve.

    Parameters
    ----------
    start, until : shares of the updates between which the sparsity rises. every : updates between
        two prunings; there is always one at the end of the curve.
    keep_removed : remember the values of removed weights and let them compete at every pruning,
        as in the paper, where a weight whose rivals shrink comes back; costs a dense copy.

    Source: arXiv 1710.01878, §3, eq. 1.

    Departs from the paper: nothing known; without ``keep_removed`` removed weights stay away.
    """

    patterns: ClassVar[tuple[str, ...]] = ("layer", "model", "row", "block")
    card: ClassVar[Card] = Card(
        title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
        year=2017,
        arxiv="1710.01878",
        family="training",
        when="during training",
        start="dense to sparse",
        masks="dynamic",
        site="linear weight, convolution",
        score="|w|",
        pattern="unstructured, constant fan-in, block",
        budget="sparsity; uniform as a rule, any allocation, or one competition of all layers",
        schedule="cubic",
        update="training under the mask",
        kernel="masked dense",
        departs="nothing known; the return of removed weights is a choice",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 5, "every": 1, "batch_size": 3}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    allocation: Allocation = "uniform"
    every: int = 100
    start: float = 0.0
    until: float = 0.75
    keep_removed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("every", self.every, 1)
        check_share("start", self.start)
        check_share("until", self.until)
        if self.until <= self.start:
            raise GossamerError(
                f"the schedule ends at {self.until:g} of the steps, before it starts at "
                f"{self.start:g}; give start < until"
            )

    @property
    def remembers_removed(self) -> bool:
        return self.keep_removed

    @property
    def curve(self) -> Cubic:
        """Sparsity by update."""
        first = round(self.start * self.steps)
        last = max(first + 1, round(self.until * self.steps))
        return Cubic(self.final_sparsity, first, last, self.every)

    @property
    def initial_sparsity(self) -> float:
        return 0.0

    def sparsity_at(self, update: int) -> float:
        return self.curve.at(update).sparsity

    def change(self, update: int) -> Change | None:
        """Prune where the curve says so."""
        at = self.curve.at(update)
        return Change(sparsity=at.sparsity) if at.update else None
