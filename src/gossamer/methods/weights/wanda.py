"""Wanda: keep a weight if it is large and its input is loud.

|weight| times the norm of the feature it multiplies, compared inside each output row. One
forward pass over calibration text; survivors keep their values.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core import Card, Pattern, Stat, Unstructured
from gossamer.core.scores import weight_times_input
from gossamer.methods.weights.base import LayerView, Scored

__all__ = ["Wanda"]


@dataclass(frozen=True, kw_only=True)
class Wanda(Scored):
    """Prune linear layers by weight magnitude times input norm.

    The norms of a block are measured with all earlier blocks already pruned, as in the paper.

    Parameters
    ----------
    pattern : the comparison group; the row is the paper's choice and its key ablation.
    """

    card: ClassVar = Card(
        title="A Simple and Effective Pruning Approach for Large Language Models",
        year=2024,
        arxiv="2306.11695",
        family="weights",
        when="after training",
        site="linear weight",
        score="|w| · ‖x‖₂",
        pattern="unstructured per row, N:M",
        budget="sparsity; any allocation",
        departs="the input norm is summed over tokens, not averaged over samples (the same order); "
        "exactly round((1 - s) n) weights stay in a row, the official code removes int(s n)",
    )
    needs: ClassVar = frozenset({Stat.INPUT_L2})

    pattern: Pattern = Unstructured(per="row")

    def score(self, layer: LayerView) -> Tensor:
        return weight_times_input(layer.weight, layer.stat(Stat.INPUT_L2))
