"""Mutual Choice and Feature Choice: a budget over the matrix of tokens and latents.

TopK lets every token choose its latents. Here every latent chooses its tokens (feature choice),
which leaves none unused, or tokens and latents choose each other (mutual choice).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gossamer.core import Card, unknown
from gossamer.methods.features import rules
from gossamer.methods.features.base import CountedMethod

__all__ = ["MutualChoice"]


@dataclass(frozen=True, kw_only=True)
class MutualChoice(CountedMethod):
    """Learn a dictionary whose budget of k latents a token is spent over tokens and latents.

    Parameters
    ----------
    k : mean number of latents of a token, 1 <= k <= width.
    choice : ``mutual``: the best matches of a batch stay, whoever they belong to. ``feature``:
        every latent keeps its own best tokens, as many as the prior gives it; a batch should
        hold several times as many kept entries as there are latents.
    prior : of how often a latent fires, in feature choice: ``zipf`` by its rank, or ``uniform``.
    exponent, offset : of Zipf's law, 1 / (rank + offset)^exponent.
    tau : share of the density that Zipf's law predicts for its rank below which a latent is
        underused and models the error (aux_zipf); 0 revives dead latents alone (AuxK).

    Source: arXiv 2411.02124, §3 and §4. Departs from the paper: law, exponent and tau are ours
    (its constants could not be checked); feature choice is trained from the start instead of
    after mutual choice; thresholds are running means of the smallest value kept.
    """

    card: ClassVar[Card] = Card(
        title="Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders",
        year=2024,
        arxiv="2411.02124",
        system="mutual_choice",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="pre-activation of a latent at a token",
        pattern="unstructured per batch, or per latent",
        budget="k latents of a token on average",
        schedule="constant",
        update="learned dictionary",
        kernel="sparse_code",
        departs="constants of the density law and of aux_zipf are ours; feature choice from the "
        "start, not after mutual choice",
    )

    example: ClassVar[Mapping[str, Any]] = {"k": 8}

    choice: Literal["mutual", "feature"] = "feature"
    prior: Literal["zipf", "uniform"] = "zipf"
    exponent: float = 1.0
    offset: float = 0.0
    tau: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choice not in ("mutual", "feature"):
            raise unknown("choice", self.choice, ("mutual", "feature"))
        self._rule(self.width or self.k)

    def _rule(self, width: int) -> rules.Rule:
        law = {"tau": self.tau, "exponent": self.exponent, "offset": self.offset}
        if self.choice == "mutual":
            return rules.MutualChoice(self.k, width, **law)
        return rules.FeatureChoice(self.k, width, prior=self.prior, **law)

    def rule(self) -> rules.Rule:
        assert self.width is not None
        return self._rule(self.width)
