"""BatchTopK sparse autoencoder: k latents a token on average, more where a token needs more.

In training the tokens of a batch compete for one budget; afterwards one threshold, tracked in
training, decides, so that a token's code never depends on its neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.core import Card
from gossamer.methods.features.base import CountedMethod
from gossamer.methods.features.rules import BatchTopK, Rule

__all__ = ["BatchTopKSAE"]


@dataclass(frozen=True, kw_only=True)
class BatchTopKSAE(CountedMethod):
    """Learn a dictionary in which tokens are sums of k atoms on average.

    Parameters
    ----------
    k : mean number of latents of a token, 1 <= k <= width.

    Source: arXiv 2412.06410, §3. Departs from the paper: the threshold is a running mean from
    the first step on, over about 100 steps, so that short runs have one; activations are scaled
    by one number instead of standardised token by token.
    """

    card: ClassVar[Card] = Card(
        title="BatchTopK Sparse Autoencoders",
        year=2024,
        arxiv="2412.06410",
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
        departs="the threshold is tracked from the first step; activations scaled by one number",
    )

    example: ClassVar[Mapping[str, Any]] = {"k": 8}

    def rule(self) -> Rule:
        return BatchTopK(self.k)
