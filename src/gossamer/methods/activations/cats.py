"""CATS: skip the neurons whose activated gate is small for this token.

Most |SiLU(W_g x)| are near zero. Where one is, neither its row of W_u nor its column of W_d is
read; the gate matrix always is.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core import Card, Site
from gossamer.methods.activations.base import Thresholded
from gossamer.methods.activations.neurons import NEURONS

__all__ = ["CATS"]


@dataclass(frozen=True, kw_only=True)
class CATS(Thresholded):
    """Gate the neurons of every MLP at a quantile of |phi(W_g x)|.

    ``sparsity`` is that of the gated neurons, so the MLP as a whole reads a third and
    ``1 - sparsity`` of the other two thirds. An MLP without a gate matrix is gated at the input
    of its down projection. Experts of a layer share one threshold.

    Source: arXiv 2404.08763, §4.

    Departs from the paper: the quantile of |v| is taken within 0.1 % over all calibration values,
    not from 20,000 bins on [-2, 2]; any activation function; every token but a short prefix is
    masked; no fine-tuning.
    """

    card: ClassVar[Card] = Card(
        title="CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models",
        system="cats",
        year=2024,
        arxiv="2404.08763",
        family="activations",
        when="inference",
        masks="dynamic",
        site="activated gate of the MLP",
        score="|phi(W_g x)_j|",
        pattern="any neuron, per token",
        budget="sparsity of the neurons, as a calibrated threshold per layer",
        schedule="calibrated once",
        update="none",
        kernel="masked dense",
        departs="quantile of |v| over all values; any activation; prefix dense; no fine-tuning",
    )
    roles: ClassVar[tuple[str, ...]] = (NEURONS,)
    paper_dense: ClassVar[float | None] = 0.0

    sparsity: float = 0.5

    def channel_weight(self, site: Site, weight: Tensor) -> None:
        return None
