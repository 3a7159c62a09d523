"""TopK sparse autoencoder: exactly k latents speak for a token.

The k largest pre-activations stay, so no penalty shrinks them; latents that fall silent are
brought back by letting them model the error of the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from gossamer.core import Card, GossamerError
from gossamer.methods.features.base import DictionaryMethod
from gossamer.methods.features.rules import Rule, TopK
from gossamer.methods.features.training import Recipe

__all__ = ["TopKSAE"]


@dataclass(frozen=True, kw_only=True)
class TopKSAE(DictionaryMethod):
    """Learn a dictionary in which every token is a sum of at most k atoms.

    Parameters
    ----------
    k : latents kept of each token, 1 <= k <= width.
    aux_k : dead latents that model the error of a token; None: half the activations' width; 0
        turns the auxiliary loss off.
    aux_coefficient : weight of the auxiliary loss, >= 0.

    Source: arXiv 2406.04093, §2 and app. A. Departs from the paper: no average of weights over
    time, no Multi-TopK; inputs are scaled by one number instead of normalised token by token;
    the dead-latent window is 5 % of the tokens when that is below the paper's 10 million; atoms
    are renormalised after the step, so that saved ones have norm 1.
    """

    card: ClassVar[Card] = Card(
        title="Scaling and evaluating sparse autoencoders",
        year=2024,
        arxiv="2406.04093",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="pre-activation of a latent",
        pattern="unstructured per token",
        budget="k latents of each token",
        schedule="constant",
        update="learned dictionary",
        kernel="embedding_bag",
        departs="no weight averaging, no Multi-TopK; inputs scaled by one number; the window after "
        "which a latent is dead is 5 % of the tokens on small runs",
    )

    example: ClassVar[Mapping[str, Any]] = {"k": 8}

    k: int = 32
    aux_k: int | None = None
    aux_coefficient: float = 1 / 32

    def __post_init__(self) -> None:
        super().__post_init__()
        TopK(self.k)
        if self.width is not None and self.width < self.k:
            raise GossamerError(f"k is {self.k}, above the width {self.width}; lower k")
        if self.aux_k is not None and self.aux_k < 0:
            raise GossamerError(f"aux_k is {self.aux_k}; give a whole number, at least 0")
        if not 0 <= self.aux_coefficient < float("inf"):
            raise GossamerError(f"aux_coefficient is {self.aux_coefficient}; it is at least 0")

    def rule(self) -> Rule:
        return TopK(self.k)

    def recipe(self, steps: int, batch_size: int) -> Recipe:
        base = super().recipe(steps, batch_size)
        return replace(base, aux_k=self.aux_k, aux_coefficient=self.aux_coefficient)
