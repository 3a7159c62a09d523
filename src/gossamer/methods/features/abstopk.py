"""AbsTopK: the k latents furthest from zero, on either side.

A latent that may be negative stands for both ends of a concept, so opposite directions need no
atom each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card
from gossamer.methods.features import rules
from gossamer.methods.features.base import CountedMethod

__all__ = ["AbsTopK"]


@dataclass(frozen=True, kw_only=True)
class AbsTopK(CountedMethod):
    """Learn a dictionary of two-sided atoms: the k largest |pre-activations| stay, with sign.

    Codes are counted, revived and reported by their size: a negative value fires too.

    Parameters
    ----------
    k : latents kept of each token, 1 <= k <= width.

    Source: arXiv 2510.00404, §3. Departs from the paper: a token chooses its own k, as the
    operator of the paper says (the authors' code lets the tokens of a batch compete);
    activations are scaled by one number instead of standardised token by token.
    """

    card: ClassVar[Card] = Card(
        title="AbsTopK: Rethinking Sparse Autoencoders For Bidirectional Features",
        year=2025,
        arxiv="2510.00404",
        system="abstopk",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="size of the pre-activation of a latent",
        pattern="unstructured per token",
        budget="k latents of each token",
        schedule="constant",
        update="learned dictionary",
        kernel="sparse_code",
        departs="selection per token (the authors' code selects per batch); activations scaled "
        "by one number",
    )

    example: ClassVar[Mapping[str, Any]] = {"k": 8}

    def rule(self) -> rules.Rule:
        return rules.AbsTopK(self.k)
