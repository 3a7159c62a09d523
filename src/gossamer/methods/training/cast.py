"""CAST: train dense while a growing pull takes the weights outside an N:M mask to zero."""

from dataclasses import dataclass
from typing import ClassVar

from gossamer.core import Card, check_count
from gossamer.core.budget import check_number
from gossamer.methods.training.base import check_share
from gossamer.methods.training.nm.adam import Decay
from gossamer.methods.training.nm.base import Taught

__all__ = ["CAST"]


@dataclass(frozen=True, kw_only=True)
class CAST(Taught):
    """Train on with AdamS, scaled weights and a dense teacher, and prune when it costs nothing.

    The forward pass is dense until ``finish``. AdamS: with α = t / steps, removed weights follow
    (1 - α) m + α λ sign(w) in place of Adam's first moment m.

    Parameters
    ----------
    pull : λ. It acts where it is of the order of the gradients' moments, which it competes with
        until α is near 1: the paper's 4e-7 for LLaMA2-7B and 4M tokens an update; small models and
        batches have larger gradients and take more. The report says what was left.
    every : updates between choices of the masks.
    parts : trained scales of every output, one for each equal part of its inputs; folded into the
        weights at the end. 0 trains none.
    distill : share η of the loss that is divergence from the dense model; 0 needs no teacher.
    temperature : of that divergence.

    The learning rate bounds what the pull can do: a weight moves by about the rate at an update,
    so the rates of all updates times α must exceed the size of removed weights.

    Source: arXiv 2509.25996, algorithms 1 and 2, after a third party's account of them.

    Departs from the paper: betas, ε and the rates are the optimizer's; scales train from the
    gradient after clipping.
    """

    card: ClassVar[Card] = Card(
        title="CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for "
        "Large Language Models",
        year=2025,
        arxiv="2509.25996",
        system="cast",
        family="training",
        when="during training",
        start="dense to sparse",
        masks="dynamic",
        site="linear weight",
        score="|w| of the dense weights",
        pattern="N:M",
        budget="N of M, or any allocation with N varying by layer",
        schedule="masks chosen anew every 10 updates; the pull grows linearly",
        update="AdamS, trained scales, distillation from the dense model",
        kernel="masked dense",
        departs="betas, ε and rates are the optimizer's; scales see clipped gradients",
    )

    pull: float = 4e-7
    every: int = 10
    parts: int = 2
    distill: float = 1 / 3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("pull", self.pull)
        check_share("distill", self.distill)
        check_count("every", self.every, 1)
        check_count("parts", self.parts, 0)
        check_number("temperature", self.temperature, above=0.0)

    @property
    def changes_adam(self) -> bool:
        return True

    @property
    def keeps_dense(self) -> bool:
        """Only where scales stand between the weights and what the network computes with."""
        return self.parts > 0

    @property
    def scales(self) -> int:
        return self.parts

    @property
    def distilled_share(self) -> float:
        return self.distill

    @property
    def distilled_temperature(self) -> float:
        return self.temperature

    def refreshes(self, t: int) -> bool:
        return t % self.every == 0

    def removed_share(self, t: int) -> float:
        """All of it, until ``finish``."""
        return 1.0

    def decay(self, t: int, lr: float) -> Decay | None:
        """α λ sign(w), and 1 - α of the moment."""
        if not self.pull:
            # Without a pull there is nothing to make room for: Adam.
            return Decay(0.0, into="moment")
        share = min(1.0, t / self.steps)
        return Decay(share * self.pull, into="moment", toward="sign", keep=1.0 - share)
