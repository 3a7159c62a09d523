"""JumpReLU sparse autoencoder: every latent learns the threshold above which it speaks.

The count of active latents itself is penalised, through straight-through derivatives in a narrow
window around each threshold.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar

from gossamer.core import Card, GossamerError
from gossamer.methods.features.base import DictionaryMethod
from gossamer.methods.features.rules import JumpReLU, Rule
from gossamer.methods.features.training import Recipe

__all__ = ["JumpReLUSAE"]


@dataclass(frozen=True, kw_only=True)
class JumpReLUSAE(DictionaryMethod):
    """Learn a dictionary and a threshold for every latent, steered to a mean number of latents.

    Parameters
    ----------
    target_l0 : mean number of latents of a token that training steers to, up to the width.
    coefficient : weight of (L0 / target - 1)² beside the squared error of a token, for
        activations scaled to a mean norm of sqrt(width); it rises linearly over the first 5 %
        of the run.
    bandwidth : width of the window around a threshold in which it has a derivative, in units of
        the scaled activations; narrower is less biased and slower.
    initial : first threshold, at least half the bandwidth.

    Source: arXiv 2407.14435, §3 and the target-L0 loss of its appendix. Departs from the paper:
    the bandwidth suits scaled activations (0.2, not 0.001); Adam's first moment decays by 0.9
    (the paper's recipe has 0); thresholds are kept above half the bandwidth by a clamp.
    """

    card: ClassVar[Card] = Card(
        title="Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders",
        year=2024,
        arxiv="2407.14435",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="pre-activation above a learned threshold",
        pattern="unstructured per token",
        budget="emergent: a penalty steers the mean count to a target",
        schedule="penalty rises over the first 5 % of the run",
        update="learned dictionary",
        kernel="sparse_code",
        departs="wider window (0.2) for activations scaled to norm sqrt(width); Adam's first "
        "moment"
        "decays by 0.9 instead of 0",
    )

    example: ClassVar[Mapping[str, Any]] = {"target_l0": 8.0}

    target_l0: float = 32.0
    coefficient: float = 10.0
    bandwidth: float = 0.2
    initial: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target_l0 < float("inf"):
            raise GossamerError(f"target_l0 is {self.target_l0!r}; give a number above 0")
        self._rule(self.width or ceil(self.target_l0))

    def _rule(self, width: int) -> Rule:
        return JumpReLU(
            width,
            target=self.target_l0,
            coefficient=self.coefficient,
            bandwidth=self.bandwidth,
            initial=self.initial,
            warmup=self.warmup_rows,
        )

    def rule(self) -> Rule:
        assert self.width is not None
        return self._rule(self.width)

    def recipe(self, steps: int, batch_size: int) -> Recipe:
        return replace(super().recipe(steps, batch_size), aux_k=0)
