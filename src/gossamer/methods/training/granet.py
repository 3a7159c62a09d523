"""GraNet: prune gradually, and at every pruning grow anew what the network misses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card, GossamerError, Pattern, Unstructured, check_count, check_sparsity
from gossamer.core.schedule import Cosine, Cubic
from gossamer.methods.training.base import Change, SparseTraining, check_share

__all__ = ["GraNet"]


@dataclass(frozen=True, kw_only=True)
class GraNet(SparseTraining):
    """Gradual magnitude pruning with regeneration: drop more than needed, grow by gradient.

    Parameters
    ----------
    pattern : ``"model"`` lets all layers compete when pruning, as in the paper.
    initial : sparsity of the random masks a training starts with, spread by ``allocation``:
        0.5 is the paper's sparse to sparse, 0 its dense to sparse.
    start, until : shares of the updates between which the sparsity rises.
    every : updates between changes; they go on after the curve has ended.
    exchange : share of every layer's weights regenerated at first; it falls as half a cosine to a
        hundredth of that at the end.

    Source: arXiv 2106.10404, §4, algorithm 1.

    Departs from the paper: counts are exact where its code keeps what exceeds a threshold; a layer
    keeps at least its largest weight; regeneration ends ``every`` updates before training does.
    """

    patterns: ClassVar[tuple[str, ...]] = ("model", "layer", "row")
    card: ClassVar[Card] = Card(
        title="Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
        year=2021,
        arxiv="2106.10404",
        system="granet",
        family="training",
        when="during training",
        start="sparse to sparse",
        masks="dynamic",
        site="linear weight, convolution",
        score="prune and drop by |w|, grow by |gradient|",
        pattern="unstructured, constant fan-in",
        budget="sparsity; one competition of all layers",
        schedule="cubic; regenerated share falls as half a cosine",
        update="training under the mask",
        kernel="masked dense",
        departs="exact counts; no layer is emptied; no regeneration without training after it",
    )
    example: ClassVar[Mapping[str, Any]] = {
        "steps": 6,
        "every": 1,
        "batch_size": 3,
        "initial": 0.0,
    }
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    pattern: Pattern = Unstructured(per="model")
    initial: float = 0.5
    every: int = 100
    start: float = 0.0
    until: float = 0.6875
    exchange: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("every", self.every, 1)
        check_sparsity(self.initial, "initial")
        check_share("start", self.start)
        check_share("until", self.until)
        check_share("exchange", self.exchange)
        if self.initial > self.final_sparsity:
            raise GossamerError(
                f"initial {self.initial:g} is above the sparsity {self.final_sparsity:g}; "
                "weights are pruned gradually, so give initial <= sparsity"
            )
        if self.until <= self.start:
            raise GossamerError(
                f"the schedule ends at {self.until:g} of the steps, before it starts at "
                f"{self.start:g}; give start < until"
            )

    @property
    def curve(self) -> Cubic:
        """Sparsity by update."""
        first = round(self.start * self.steps)
        last = max(first + 1, round(self.until * self.steps))
        return Cubic(self.final_sparsity, first, last, self.every, self.initial)

    @property
    def initial_sparsity(self) -> float:
        return self.initial

    def sparsity_at(self, update: int) -> float:
        return self.curve.at(update).sparsity

    def change(self, update: int) -> Change | None:
        """Prune along the curve, and regenerate as long as there is training left to use it."""
        at, curve = self.curve.at(update), self.curve
        regular = update >= curve.start and (update - curve.start) % self.every == 0
        if not at.update and not regular:
            return None
        falling = Cosine(self.exchange, 0.01 * self.exchange, 0, self.steps)
        share = falling.at(update).sparsity if update + self.every <= self.steps else 0.0
        if not at.update and not share:
            return None
        return Change(sparsity=at.sparsity if at.update else None, exchange=share)
