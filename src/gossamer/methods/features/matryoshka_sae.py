"""Matryoshka sparse autoencoder: the first latents must do without the rest.

Nested dictionaries share one selection; because the inner ones reconstruct alone, general
features stay whole instead of being absorbed by specific ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card
from gossamer.methods.features.base import CountedMethod
from gossamer.methods.features.rules import Matryoshka, Rule

__all__ = ["MatryoshkaSAE"]


@dataclass(frozen=True, kw_only=True)
class MatryoshkaSAE(CountedMethod):
    """Learn nested dictionaries in one: BatchTopK codes whose prefixes reconstruct too.

    Parameters
    ----------
    k : mean number of latents of a token, 1 <= k <= width.
    fractions : share of the latents that each nested group adds; they sum to 1.

    Source: arXiv 2503.17547, §3. Departs from the paper: no reconstruction from the bias alone
    among the nested losses (the authors' code counts it); the threshold is tracked from the
    first step; activations are scaled by one number.
    """

    card: ClassVar[Card] = Card(
        title="Learning Multi-Level Features with Matryoshka Sparse Autoencoders",
        year=2025,
        arxiv="2503.17547",
        family="features",
        when="after training",
        start="dense",
        masks="dynamic",
        site="output of any module",
        score="pre-activation of a latent",
        pattern="unstructured per batch",
        budget="k latents of a token on average",
        schedule="constant",
        update="learned dictionary",
        kernel="sparse_code",
        departs="no bias-only reconstruction among the nested losses; threshold tracked from the "
        "first step",
    )

    example: ClassVar[Mapping[str, Any]] = {"k": 8}

    fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)

    def __post_init__(self) -> None:
        super().__post_init__()
        Matryoshka(self.k, self.fractions)

    def rule(self) -> Rule:
        return Matryoshka(self.k, self.fractions)
