"""Random pruning: keep weights by lot.

The baseline every comparison shows: what a method gains over it is what its score knows.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.core import Card, Pattern, Unstructured
from gossamer.core.scores import uniform_random
from gossamer.methods.weights.base import LayerView, Scored

__all__ = ["Random"]


@dataclass(frozen=True, kw_only=True)
class Random(Scored):
    """Prune linear layers uniformly at random.

    Parameters
    ----------
    pattern : per row by default, like the methods it is compared with.
    seed : >= 0; every layer draws from its own stream.
    """

    card: ClassVar = Card(
        title="Random pruning (control, no paper)",
        year=None,
        family="weights",
        when="after training",
        site="linear weight",
        score="uniform noise",
        pattern="unstructured, N:M, block, channels",
        budget="sparsity; any allocation",
    )

    pattern: Pattern = Unstructured(per="row")
    seed: int = 0

    def score(self, layer: LayerView) -> Tensor:
        return uniform_random(layer.weight, layer.seed)
