"""ReLU sparse autoencoder: an L1 penalty makes the codes few, and too small.

The baseline of the family: all others keep the encoder and decoder and replace the penalty.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from gossamer.core import Card
from gossamer.methods.features.base import DictionaryMethod
from gossamer.methods.features.rules import ReLU, Rule
from gossamer.methods.features.training import Recipe

__all__ = ["ReLUSAE"]


@dataclass(frozen=True, kw_only=True)
class ReLUSAE(DictionaryMethod):
    """Learn a dictionary whose codes are positive and small in sum.

    Parameters
    ----------
    coefficient : weight of sum_i z_i ‖d_i‖ beside the squared error of a token (summed over
        channels), for activations scaled to a mean norm of sqrt(width); it rises linearly over
        the first 5 % of the run.

    Source: arXiv 2309.08600, §2; the penalty with atom norms and the schedule follow
    Anthropic's update of April 2024. Departs from the paper: encoder and atoms are separate
    weights, tied at the start alone; dead latents are not resampled.
    """

    card: ClassVar[Card] = Card(
        title="Sparse Autoencoders Find Highly Interpretable Features in Language Models",
        year=2023,
        arxiv="2309.08600",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="pre-activation of a latent",
        pattern="unstructured per token",
        budget="emergent: an L1 penalty on the codes",
        schedule="penalty rises over the first 5 % of the run",
        update="learned dictionary",
        kernel="sparse_code",
        departs="encoder and atoms are tied at the start alone; no resampling of dead latents",
    )

    example: ClassVar[Mapping[str, Any]] = {}

    coefficient: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ReLU(self.coefficient)

    def rule(self) -> Rule:
        return ReLU(self.coefficient, self.warmup_rows)

    def recipe(self, steps: int, batch_size: int) -> Recipe:
        return replace(super().recipe(steps, batch_size), aux_k=0)
