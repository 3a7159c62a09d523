"""Gradient SAE: of the latents that speak, those the model listens to.

TopK ranks latents by how loud they are; here also by how much the model's own loss would change
along their atoms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card
from gossamer.methods.features.base import CountedMethod
from gossamer.methods.features.objective import Layout
from gossamer.methods.features.readers import GradientReader, Reader
from gossamer.methods.features.rules import GradientTopK, Rule
from gossamer.methods.features.source import ActivationSource

__all__ = ["GradientSAE"]


@dataclass(frozen=True, kw_only=True)
class GradientSAE(CountedMethod):
    """Learn a TopK dictionary whose selection in training reads the gradient of the model's loss.

    A latent is ranked by z_i (1 + beta |d_i · g|). The gradient g of the next-token loss by the
    activation is measured beside it, at the cost of one backward pass of the model a token, and
    is scaled to norm sqrt(width) at every token, since its size varies by orders of magnitude.
    Afterwards the dictionary selects by z_i alone.

    Parameters
    ----------
    k : latents kept of each token, 1 <= k <= width.
    beta : weight of the gradient in the ranking, >= 0; 0 is TopK.

    Source: arXiv 2411.10397, §3. Departs from the paper: beta and the scale of the gradient are
    ours (the paper's could not be checked); after training no gradient is read.
    """

    card: ClassVar[Card] = Card(
        title="Features that Make a Difference: Leveraging Gradients for Improved Dictionary "
        "Learning",
        year=2024,
        arxiv="2411.10397",
        system="gradient_sae",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="pre-activation times (1 + influence on the model's loss)",
        pattern="unstructured per token",
        budget="k latents of each token",
        schedule="constant",
        update="learned dictionary",
        kernel="sparse_code",
        departs="gradients are scaled to one norm at every token, and beta suits that; none is "
        "read after training",
    )

    example: ClassVar[Mapping[str, Any]] = {"k": 8}
    exempt: ClassVar[Mapping[str, str]] = {
        **CountedMethod.exempt,
        "encoders": "the gradient of the next-token loss needs a causal language model",
    }

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        GradientTopK(self.k, self.beta)

    def reader(self, hook: str) -> Reader:
        return GradientReader(hook)

    def layout(self, source: ActivationSource) -> Layout:
        return Layout(source.width // 2, 0, source.width // 2)

    def rule(self) -> Rule:
        return GradientTopK(self.k, self.beta)
