"""SNIP: before training, keep the weights whose removal would change the loss most."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from gossamer.core import Card
from gossamer.core.scores import taylor
from gossamer.methods.training.at_start.scored import AtStart, gradients_of, needed
from gossamer.methods.training.base import StartLoss
from gossamer.methods.training.sparsifier.layers import Layer
from gossamer.methods.training.sparsifier.layout import here

__all__ = ["SNIP"]


@dataclass(frozen=True, kw_only=True)
class SNIP(AtStart):
    """Prune an untrained network by |w · ∂L/∂w|, then train what is left.

    ``attach`` takes ``loss``, a function of the model that gives the loss of a batch or a few;
    ``apply`` takes the first batch of the training.

    Source: arXiv 1810.02340, §4.1, eq. 5.

    Departs from the paper: nothing known; the weights need not be freshly drawn.
    """

    card: ClassVar[Card] = Card(
        title="SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        year=2018,
        arxiv="1810.02340",
        family="training",
        when="before training",
        start="sparse to sparse",
        masks="static",
        site="linear weight, convolution",
        score="|w · gradient|",
        pattern="unstructured, constant fan-in, N:M, block",
        budget="sparsity; one competition of all layers",
        schedule="once, before the first update",
        update="training under the mask",
        kernel="masked dense",
    )

    scores_shards: ClassVar[bool] = True
    starts_from: ClassVar = "loss"

    def scores(
        self, model: nn.Module, layers: tuple[Layer, ...], loss: StartLoss | None
    ) -> dict[str, Tensor]:
        gradients = gradients_of(needed(self, loss)(model), model, layers)
        return {
            layer.name: taylor(
                layer.view(here(model.get_parameter(layer.parameter).detach())),
                layer.view(gradients[layer.parameter]),
            )
            for layer in layers
        }
