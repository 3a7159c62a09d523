"""Gated sparse autoencoder: one half of the encoder decides who speaks, the other how loud.

Only the gate pays the L1 penalty, so what is kept is not shrunk by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from gossamer.core import Card
from gossamer.methods.features.base import DictionaryMethod
from gossamer.methods.features.rules import Gated, Rule
from gossamer.methods.features.training import Recipe

__all__ = ["GatedSAE"]


@dataclass(frozen=True, kw_only=True)
class GatedSAE(DictionaryMethod):
    """Learn a dictionary with a gate per latent, trained through an auxiliary reconstruction.

    Parameters
    ----------
    coefficient : weight of the L1 norm of the open gates beside the squared errors of a token,
        for activations scaled to a mean norm of sqrt(width); it rises linearly over the first
        5 % of the run.

    Source: arXiv 2404.16014, §3.2. Departs from the paper: Adam's first moment decays by 0.9
    (the paper's recipe has 0), dead latents are not resampled.
    """

    card: ClassVar[Card] = Card(
        title="Improving Dictionary Learning with Gated Sparse Autoencoders",
        year=2024,
        arxiv="2404.16014",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="pre-activation of a gate",
        pattern="unstructured per token",
        budget="emergent: an L1 penalty on the gates",
        schedule="penalty rises over the first 5 % of the run",
        update="learned dictionary",
        kernel="sparse_code",
        departs="Adam's first moment decays by 0.9 instead of 0; no resampling of dead latents",
    )

    example: ClassVar[Mapping[str, Any]] = {}

    coefficient: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        Gated(1, coefficient=self.coefficient)

    def rule(self) -> Rule:
        assert self.width is not None
        return Gated(self.width, coefficient=self.coefficient, warmup=self.warmup_rows)

    def recipe(self, steps: int, batch_size: int) -> Recipe:
        return replace(super().recipe(steps, batch_size), aux_k=0)
