"""AST: continue a model's training behind an N:M mask, with a decay that is annealed in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card, check_count
from gossamer.core.budget import check_number
from gossamer.methods.training.base import check_share
from gossamer.methods.training.nm.adam import Decay
from gossamer.methods.training.nm.base import Taught

__all__ = ["AST"]


@dataclass(frozen=True, kw_only=True)
class AST(Taught):
    """Train on through adaptive masks, taught by the dense model; SLoRB adds a small branch.

    Parameters
    ----------
    pull : λ of the decay. λ (1 - M) w joins Adam's first moment of the loss's gradient at every
        update, and is not remembered by it. The paper's 6e-5 to 1e-4.
    ramp : share of the updates over which λ rises linearly from 0.
    every : updates between choices of the masks.
    distill : share of the loss that is divergence from the dense model; 0.67 for small models,
        0.5 for LLaMA. temperature : of that divergence.
    slorb : inputs k of a block of the branch S (P x) beside every layer: O · I / k more weights,
        and I² / k of the projection P, both trained. The paper's boosted form has 16; 0 adds none.

    Source: arXiv 2407.20584, §3 and the official repository.

    Departs from the paper: masks by |w| only, where it also offers Wanda's score; no loss on
    hidden states, which its configurations weigh by 0. The branch is dense and stays beside the
    N:M weights, as a hook; the report counts it in the note on memory only.
    """

    card: ClassVar[Card] = Card(
        title="Pruning Large Language Models with Semi-Structural Adaptive Sparse Training",
        year=2024,
        arxiv="2407.20584",
        system="ast",
        family="training",
        when="during training",
        start="dense to sparse",
        masks="dynamic",
        site="linear weight",
        score="|w| of the dense weights",
        pattern="N:M",
        budget="N of M, or any allocation with N varying by layer",
        schedule="masks chosen anew every 10 updates; the decay rises linearly",
        update="straight-through gradient, decay in Adam's update, distillation, SLoRB",
        kernel="masked dense",
        departs="masks by |w| only; no loss on hidden states",
    )
    example: ClassVar[Mapping[str, Any]] = {"steps": 4, "batch_size": 3}

    pull: float = 1e-4
    ramp: float = 0.25
    every: int = 10
    distill: float = 0.67
    temperature: float = 2.0
    slorb: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("pull", self.pull)
        check_share("ramp", self.ramp)
        check_share("distill", self.distill)
        check_count("every", self.every, 1)
        check_count("slorb", self.slorb, 0)
        check_number("temperature", self.temperature, above=0.0)

    @property
    def changes_adam(self) -> bool:
        return True

    @property
    def low_rank_block(self) -> int:
        return self.slorb

    @property
    def distilled_share(self) -> float:
        return self.distill

    @property
    def distilled_temperature(self) -> float:
        return self.temperature

    def refreshes(self, t: int) -> bool:
        return t % self.every == 0

    def removed_share(self, t: int) -> float:
        return 0.0

    def decay(self, t: int, lr: float) -> Decay | None:
        """λ (1 - M) w beside the moment, rising."""
        risen = min(1.0, t / max(1.0, self.ramp * self.steps))
        return Decay(self.pull * risen, into="moment")
