"""RigL: every so often drop the smallest weights and grow where the gradient is largest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card, GossamerError, check_count
from gossamer.core.schedule import Cosine
from gossamer.methods.training.base import Change, SparseTraining, check_share

__all__ = ["RigL"]


@dataclass(frozen=True, kw_only=True)
class RigL(SparseTraining):
    """Train sparsely with masks that move towards large gradients.

    Parameters
    ----------
    every : updates between changes. until : share of the updates after which masks stay.
    exchange : share of a layer's weights exchanged at first, falling to 0 as half a cosine.

    A change takes the place of an update. Grown weights start at zero, without momentum; just
    dropped ones may grow again. All gradients are needed only at changes.

    Source: arXiv 1911.11134, §3, algorithm 1.

    Departs from the paper: N:M, constant fan-in and blocks grow inside their groups.
    """

    card: ClassVar[Card] = Card(
        title="Rigging the Lottery: Making All Tickets Winners",
        year=2019,
        arxiv="1911.11134",
        family="training",
        when="during training",
        start="sparse to sparse",
        masks="dynamic",
        site="linear weight, convolution",
        score="drop by |w|, grow by |gradient|",
        pattern="unstructured, constant fan-in, N:M, block",
        budget="sparsity; uniform, uniform+, ER, ERK",
        schedule="every ΔT updates; exchanged share falls as half a cosine",
        update="training under the mask",
        kernel="masked dense",
        departs="other patterns than unstructured",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 6, "every": 2, "batch_size": 3}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    every: int = 100
    until: float = 0.75
    exchange: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("every", self.every, 1)
        check_share("until", self.until)
        check_share("exchange", self.exchange)
        if not self.until:
            raise GossamerError(
                "the schedule ends at 0 of the steps, before it starts; give until above 0, or "
                "exchange=0 to keep the masks"
            )

    @property
    def initial_sparsity(self) -> float:
        return self.final_sparsity

    def sparsity_at(self, update: int) -> float:
        return self.final_sparsity

    def change(self, update: int) -> Change | None:
        """Every ``every`` updates before the end of the schedule."""
        end = max(1, int(self.until * self.steps))
        if update >= end or update % self.every:
            return None
        share = Cosine(initial=self.exchange, final=0.0, start=0, end=end).at(update).sparsity
        return Change(exchange=share, instead=True) if share > 0.0 else None
