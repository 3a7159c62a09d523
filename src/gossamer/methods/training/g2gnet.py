"""G2GNet: groups of units speak to groups, and connections grow where units fire together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from zlib import crc32

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count, unknown
from gossamer.methods.training.base import (
    Allocation,
    Change,
    SparseTraining,
    Sparsifier,
    StartLoss,
    check_share,
)
from gossamer.methods.training.modular.sparsifier import HebbianSparsifier
from gossamer.methods.training.modular.wiring import modular_score
from gossamer.methods.training.sparsifier.change import Growth
from gossamer.methods.training.sparsifier.layers import Layer, Quota

__all__ = ["G2GNet"]


@dataclass(frozen=True, kw_only=True)
class G2GNet(SparseTraining):
    """Train with modular masks that are rewired towards correlated units.

    The units of every layer stand in ``groups``. A group connects to the group of the same number
    in the next layer, then to the nearest others as far as the sparsity allows, and everywhere
    else with a small probability. Every so often the smallest weights give way to connections
    between the most correlated units.

    Parameters
    ----------
    sparsity : up to 0.75 in the paper; the number of groups reached follows from it.
    groups : of equal size, in the order of the units. elsewhere : share of the other connections
        that are there all the same.
    every : updates between changes; none in the last ``every``.
    exchange : share ζ of a layer's weights replaced at a change; 0 keeps the wiring.
    growth : ``correlation``, |Pearson correlation| of what goes into a layer at the one unit and
        comes out of it at the other; ``random`` and ``gradient`` are there to compare.
    watch : updates before a change in which correlations are measured; each costs as much as a
        dense forward pass. decay : weight of the past when a batch is added.
    grown_std : standard deviation of the values of grown weights.

    Correlations need memory of the size of the weights while they are measured. A unit that never
    changes has no correlation: it grows nothing. Convolutions stay as they are: ``skip`` them.
    Parameters sharded by FSDP are refused.

    Source: arXiv 2508.14140. Only the abstract could be checked; the rest is a reconstruction.

    Departs from the paper: unknown but for the abstract. Reconstructed: target groups of the same
    number on a ring, exact counts, the fixed share replaced, exponential averages, outputs before
    their nonlinearity, and that just dropped connections may return.
    """

    patterns: ClassVar[tuple[str, ...]] = ("layer", "row")
    keeper: ClassVar[type[Sparsifier]] = HebbianSparsifier
    card: ClassVar[Card] = Card(
        title="Neuro-inspired Ensemble-to-Ensemble Communication Primitives for Sparse and "
        "Efficient ANNs",
        year=2025,
        arxiv="2508.14140",
        system="g2gnet",
        family="training",
        when="during training",
        start="sparse to sparse",
        masks="dynamic",
        site="linear weight",
        score="groups to begin with; drop by |w|, grow by |correlation of activities|",
        pattern="unstructured, constant fan-in; modular to begin with",
        budget="sparsity, uniform over layers",
        schedule="every so many updates, a fixed share, not after the last",
        update="training under the mask",
        kernel="masked dense",
        departs="reconstruction: only the abstract could be checked (groups, dynamic masks, "
        "Hebbian regrowth by correlation); wiring, schedule and averages are ours",
    )
    example: ClassVar[Mapping[str, Any]] = {
        "steps": 6,
        "every": 2,
        "watch": 2,
        "groups": 4,
        "batch_size": 3,
    }
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    sparsity: float | None = 0.75
    allocation: Allocation = "uniform"
    groups: int = 8
    elsewhere: float = 0.05
    every: int = 100
    exchange: float = 0.2
    growth: Growth = "correlation"
    watch: int = 20
    decay: float = 0.9
    grown_std: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("groups", "every", "watch"):
            check_count(name, getattr(self, name), 1)
        check_share("exchange", self.exchange)
        check_share("decay", self.decay, high=0.999)
        check_share("grown_std", self.grown_std)
        check_share("elsewhere", self.elsewhere, high=0.999)
        if self.growth not in ("correlation", "random", "gradient"):
            raise unknown("growth", self.growth, ("correlation", "random", "gradient"))
        if self.elsewhere > 1.0 - self.final_sparsity:
            raise GossamerError(
                f"elsewhere {self.elsewhere:g} alone is more than a sparsity of "
                f"{self.final_sparsity:g} leaves; give at most {1.0 - self.final_sparsity:g}"
            )

    @property
    def initial_sparsity(self) -> float:
        return self.final_sparsity

    def sparsity_at(self, update: int) -> float:
        return self.final_sparsity

    def quotas(self, layers: tuple[Layer, ...], sparsity: float) -> dict[str, Quota]:
        """What every layer keeps at a sparsity; convolutions have no units to group."""
        for layer in layers:
            if len(layer.shape) != 2:
                raise GossamerError(
                    f"{layer.name} is a convolution; g2gnet wires units of linear layers: "
                    f"pass skip={layer.role}"
                )
        return super().quotas(layers, sparsity)

    def start_scores(
        self, model: nn.Module, layers: tuple[Layer, ...], loss: StartLoss | None
    ) -> dict[str, Tensor]:
        """Scores that choose the modular wiring."""
        quotas = self.quotas(layers, self.final_sparsity)
        return {
            layer.name: modular_score(
                layer.view(model.get_parameter(layer.parameter).detach()),
                self.groups,
                quotas[layer.name].pattern,
                quotas[layer.name].keep,
                self.elsewhere,
                crc32(f"{self.seed}:wiring:{layer.name}".encode()),
            )
            for layer in layers
        }

    def change(self, update: int) -> Change | None:
        """Every ``every`` updates, but not where fewer than that are left."""
        if update % self.every or update + self.every > self.steps or not self.exchange:
            return None
        return Change(exchange=self.exchange, growth=self.growth, grown_std=self.grown_std)

    def listens(self, update: int) -> bool:
        """Whether correlations are measured at an update, counted from 1."""
        if self.growth != "correlation":
            return False
        coming = -(-update // self.every) * self.every
        return coming - update < self.watch and self.change(coming) is not None
