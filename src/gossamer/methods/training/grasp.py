"""GraSP: before training, remove the weights without which gradients flow best."""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch import Tensor, nn

from gossamer.core import Card, GossamerError
from gossamer.methods.training.at_start.scored import AtStart, gradients_of, needed
from gossamer.methods.training.base import StartLoss
from gossamer.methods.training.sparsifier.layers import Layer

__all__ = ["GraSP"]


@dataclass(frozen=True, kw_only=True)
class GraSP(AtStart):
    """Prune an untrained network by w · Hg, the change of the gradient's norm, then train it.

    The weights with the largest -w · Hg are removed: without them the norm of the gradient falls
    least or rises. ``attach`` takes ``loss``, a function of the model that gives the loss of a
    batch or a few; ``apply`` takes the first batch of the training.

    Source: arXiv 2002.07376, §4, eq. 8.

    Departs from the paper: the loss is used as given; its code divides the logits by 200 first,
    which a loss function may do.
    """

    card: ClassVar[Card] = Card(
        title="Picking Winning Tickets Before Training by Preserving Gradient Flow",
        year=2020,
        arxiv="2002.07376",
        family="training",
        when="before training",
        start="sparse to sparse",
        masks="static",
        site="linear weight, convolution",
        score="w · Hg",
        pattern="unstructured, constant fan-in, N:M, block",
        budget="sparsity; one competition of all layers",
        schedule="once, before the first update",
        update="training under the mask",
        kernel="masked dense",
        departs="the temperature of the logits is left to the loss",
    )
    starts_from: ClassVar = "loss"

    def scores(
        self, model: nn.Module, layers: tuple[Layer, ...], loss: StartLoss | None
    ) -> dict[str, Tensor]:
        first = gradients_of(needed(self, loss)(model), model, layers, create_graph=True)
        norm = sum((g.detach() * g).sum() for g in first.values())
        assert isinstance(norm, Tensor)
        if not isfinite(float(norm.detach())):
            raise GossamerError("the gradient's norm is not finite; lower the loss's scale")
        if not norm.requires_grad:
            raise GossamerError(
                "the loss is linear in the weights, so their Hessian is zero; use snip, or a loss "
                "with curvature such as cross-entropy"
            )
        hessian = gradients_of(norm, model, layers)
        return {
            layer.name: layer.view(model.get_parameter(layer.parameter).detach()).float()
            * layer.view(hessian[layer.parameter]).float()
            for layer in layers
        }
