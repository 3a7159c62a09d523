"""TEAL: skip the input channels that are small for this token.

Hidden states are dense but peaked at zero, so removing every |x_j| below a calibrated quantile
changes a layer's output little, and the columns of W that read those channels are not loaded.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core import Card, Site
from gossamer.methods.activations.base import Thresholded

__all__ = ["TEAL"]


@dataclass(frozen=True, kw_only=True)
class TEAL(Thresholded):
    """Gate the input of every linear layer of a block at a quantile of |x|.

    Matrices that share an input (q, k, v; gate, up) have thresholds of their own. Of stacked
    experts the layer's common input and the hidden units before the down projection are gated,
    each with one threshold for all experts; the router stays dense. Thresholds are set on the
    dense model: masking earlier layers moves later inputs, attention outputs most, by a few
    points, and behind a ReLU all exact zeros are skipped, target or not. ``measure`` counts what
    is removed.

    Source: arXiv 2408.14690, §4 and algorithm 1.

    Departs from the paper: the threshold is a quantile of |x|, not of the signed histogram, so
    inputs of uneven sign are served; every token but a short prefix is masked, not the last half
    (``protocol='paper'`` masks that);
    greedy steps follow the shapes of the matrices (grouped heads included), never pass 1, are
    measured on 4 x 128 tokens, tried lazily, cut to meet the target exactly, and given up for the
    uniform split in a block where that has the smaller error; the ``global`` allocation, which
    moves sparsity between blocks, is not the paper's.
    """

    card: ClassVar[Card] = Card(
        title="Training-Free Activation Sparsity in Large Language Models",
        year=2024,
        arxiv="2408.14690",
        family="activations",
        when="inference",
        masks="dynamic",
        site="input of every linear layer of a block",
        score="|x_j|",
        pattern="any channel, per token",
        budget="sparsity, as a calibrated threshold per layer; uniform or greedy per block",
        schedule="calibrated once",
        update="none",
        kernel="masked dense",
        departs="quantile of |x|; all tokens but a prefix masked; greedy by shapes, lazy, exact",
    )

    paper_dense: ClassVar[float | None] = 0.5

    def channel_weight(self, site: Site, weight: Tensor) -> None:
        return None
