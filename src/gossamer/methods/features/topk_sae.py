"""TopK sparse autoencoder: exactly k latents speak for a token.

The k largest pre-activations stay, so no penalty shrinks them; latents that fall silent are
brought back by letting them model the error of the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card
from gossamer.methods.features.base import CountedMethod
from gossamer.methods.features.rules import Rule, TopK

__all__ = ["TopKSAE"]


@dataclass(frozen=True, kw_only=True)
class TopKSAE(CountedMethod):
    """Learn a dictionary in which every token is a sum of at most k atoms.

    Parameters
    ----------
    k : latents kept of each token, 1 <= k <= width.
    aux_k : dead latents that model the error of a token; None: half the activations' width; 0
        turns the auxiliary loss off.
    aux_coefficient : weight of the auxiliary loss, >= 0.
    multi : also ask that 4k latents reconstruct, at 1/8 of the weight (Multi-TopK), so that the
        dictionary works at larger k too.

    Source: arXiv 2406.04093, §2 and app. A. Departs from the paper: no average of weights over
    time; inputs are scaled by one number instead of normalised token by token;
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
        kernel="sparse_code",
        departs="no weight averaging; inputs scaled by one number; the window after "
        "which a latent is dead is 5 % of the tokens on small runs",
    )

    example: ClassVar[Mapping[str, Any]] = {"k": 8}

    multi: bool = False

    def rule(self) -> Rule:
        return TopK(self.k, multi=self.multi)
