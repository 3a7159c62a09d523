"""SET: every so often drop the weights closest to zero and grow as many at random."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card, check_count
from gossamer.methods.training.base import Allocation, Change, SparseTraining, check_share

__all__ = ["SET"]


@dataclass(frozen=True, kw_only=True)
class SET(SparseTraining):
    """Train sparsely with masks that move at random, away from weights that stay small.

    Parameters
    ----------
    every : updates between changes; the paper changes after every epoch but the last.
    exchange : share ζ of the positive and of the negative weights that is replaced.
    grown_std : standard deviation of the values of grown weights; 0 starts them at zero.

    Source: Nature Communications 9:2383 (2018), arXiv 1707.04780, algorithm 1.

    Departs from the paper: N:M and constant fan-in grow inside their groups; grown weights are
    drawn with a deviation of 0.01, where its code takes 0.1, which suits wide inputs only.
    """

    patterns: ClassVar[tuple[str, ...]] = ("layer", "row", "N:M")
    card: ClassVar[Card] = Card(
        title="Scalable training of artificial neural networks with adaptive sparse connectivity "
        "inspired by network science",
        year=2017,
        arxiv="1707.04780",
        family="training",
        when="during training",
        start="sparse to sparse",
        masks="dynamic",
        site="linear weight, convolution",
        score="drop by |w| within each sign, grow at random",
        pattern="unstructured, constant fan-in, N:M",
        budget="sparsity; ER as a rule",
        schedule="every so many updates, a fixed share, not after the last",
        update="training under the mask",
        kernel="masked dense",
        departs="grown weights are smaller by default; other patterns than unstructured",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 6, "every": 2, "batch_size": 3}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    allocation: Allocation = "er"
    every: int = 100
    exchange: float = 0.3
    grown_std: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("every", self.every, 1)
        check_share("exchange", self.exchange)
        check_share("grown_std", self.grown_std, high=1.0)

    @property
    def initial_sparsity(self) -> float:
        return self.final_sparsity

    def sparsity_at(self, update: int) -> float:
        return self.final_sparsity

    def change(self, update: int) -> Change | None:
        """Every ``every`` updates, but not where fewer than that are left."""
        if update % self.every or update + self.every > self.steps or not self.exchange:
            return None
        return Change(
            exchange=self.exchange, growth="random", by_sign=True, grown_std=self.grown_std
        )
