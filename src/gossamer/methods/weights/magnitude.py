"""Magnitude pruning: keep the largest weights.

The oldest score, with every allocation: per row, per layer, over the whole model, ERK.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core import Card, Pattern, Unstructured
from gossamer.core.scores import magnitude
from gossamer.methods.weights.base import LayerView, Scored

__all__ = ["Magnitude"]


@dataclass(frozen=True, kw_only=True)
class Magnitude(Scored):
    """Prune linear layers by |w|.

    Parameters
    ----------
    pattern : the group weights compete in: ``"layer"`` (default), ``"row"``, ``"model"`` for one
        competition over all layers, ``"2:4"`` and the like.
    allocation : ``"erk"`` makes larger layers sparser; see :class:`Scored`.
    """

    card: ClassVar = Card(
        title="Learning both Weights and Connections for Efficient Neural Networks",
        year=2015,
        arxiv="1506.02626",
        family="weights",
        when="after training",
        site="linear weight",
        score="|w|",
        pattern="unstructured, N:M, block, channels",
        budget="sparsity; any allocation",
        departs="one shot on the trained model; the paper alternates pruning and retraining",
    )

    pattern: Pattern = Unstructured(per="layer")

    def score(self, layer: LayerView) -> Tensor:
        return magnitude(layer.weight)
