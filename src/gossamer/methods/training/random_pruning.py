"""Random pruning: choose the weights by chance before training, and leave the choice alone.

All that is decided is how many weights each layer keeps. The baseline of all sparse training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card
from gossamer.methods.training.base import Change, SparseTraining

__all__ = ["RandomPruning"]


@dataclass(frozen=True, kw_only=True)
class RandomPruning(SparseTraining):
    """Train under a random mask that never changes.

    The shares ER, ERK and uniform+ decide how good it is; at equal shares the wider the network,
    the smaller the gap to dense.

    Source: arXiv 2202.02643, §3.

    Departs from the paper: masks keep an exact count, the paper's hold it in expectation; ERK+ and
    the shares of SNIP and GraSP are left out.
    """

    card: ClassVar[Card] = Card(
        title="The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline "
        "for Sparse Training",
        year=2022,
        arxiv="2202.02643",
        system="random_pruning",
        family="training",
        when="before training",
        start="sparse to sparse",
        masks="static",
        site="linear weight, convolution",
        score="noise",
        pattern="unstructured, constant fan-in, N:M, block",
        budget="sparsity; uniform, uniform+, ER, ERK",
        schedule="once, before the first update",
        update="training under the mask",
        kernel="masked dense",
        departs="exact counts; without ERK+ and the shares of SNIP and GraSP",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 2, "batch_size": 3}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    @property
    def initial_sparsity(self) -> float:
        return self.final_sparsity

    def sparsity_at(self, update: int) -> float:
        return self.final_sparsity

    def change(self, update: int) -> Change | None:
        """Nothing, ever."""
        return None
