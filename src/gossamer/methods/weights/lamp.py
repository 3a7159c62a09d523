"""LAMP: magnitude made comparable across layers, then one competition over the model.

A weight's score is its square over the sum of squares of all weights of its layer at least as
large, so rescaling a layer changes nothing and no layer is ever emptied.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core import Card, Pattern, Unstructured
from gossamer.core.scores import lamp
from gossamer.methods.weights.base import LayerView, Scored

__all__ = ["LAMP"]


@dataclass(frozen=True, kw_only=True)
class LAMP(Scored):
    """Prune linear layers by layer-adaptive magnitude.

    Parameters
    ----------
    pattern : ``"model"`` as in the paper; inside one layer the order equals that of |w|, so any
        other pattern is magnitude pruning.
    """

    card: ClassVar = Card(
        title="Layer-adaptive Sparsity for the Magnitude-based Pruning",
        year=2021,
        arxiv="2010.07611",
        family="weights",
        when="after training",
        site="linear weight",
        score="w² / sum of w'² over |w'| >= |w|",
        pattern="unstructured",
        budget="sparsity of the whole model",
        departs="one shot on the trained model; the paper prunes and retrains iteratively",
    )

    pattern: Pattern = Unstructured(per="model")

    def score(self, layer: LayerView) -> Tensor:
        return lamp(layer.weight)
