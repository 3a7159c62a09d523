"""Random search: of many random sparse networks, train the one with the lowest loss untrained.

A neutral baseline for every search: what it finds starts better and ends no better.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal
from zlib import crc32

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Unstructured, check_count, topk_mask, unknown
from gossamer.core.budget import check_number
from gossamer.core.scores import uniform_random
from gossamer.methods.training.at_start.scored import gradients_of, needed, untouched
from gossamer.methods.training.base import (
    Allocation,
    Change,
    SparseTraining,
    Sparsifier,
    StartLoss,
)
from gossamer.methods.training.search.search import Found, best_of
from gossamer.methods.training.search.searched import Searched
from gossamer.methods.training.search.units import (
    UnitLayer,
    kept_units,
    unit_layers,
    units_of,
    weights_kept,
)
from gossamer.methods.training.sparsifier.layers import Layer, Quota
from gossamer.models import Inputs, Tokens
from gossamer.models.fit import batches, meeting
from gossamer.models.gradient import own_loss

__all__ = ["RandomSearch"]


@dataclass(frozen=True, kw_only=True)
class RandomSearch(SparseTraining):
    """Draw masks, measure the loss of the untrained network under each, train under the best.

    In the space of nodes whole hidden units go, the same share of every hidden layer: their rows
    of the matrices before and their columns of those behind. ``sparsity`` stays the share of
    weights, of the matrices that have hidden units on a side; the nearest whole number of units is
    taken. Hidden units are the inner neurons of a transformer's MLPs and experts (its attention
    trains densely), or what lies between the layers of an ``nn.Sequential``.

    ``attach`` takes ``loss``, a function of the model that gives the loss of a sample; ``apply``
    takes the first batches of the training. The operations of the search count into
    ``sparsifier.flops.total``.

    Parameters
    ----------
    draws : masks tried; 1 is a random mask.
    space : ``node``, or ``weight`` for masks of any pattern and allocation.
    trial_steps : updates of plain gradient descent on the sample before the loss counts.
    trial_lr : of these.
    sample_batches : batches of the training that the sample amounts to.

    Source: arXiv 2403.08265 (id from memory).

    Departs from the paper, whose details were not at hand: one share of units for all hidden
    layers; the loss is that of the training, in evaluation mode.
    """

    takes_shards: ClassVar[bool] = False
    starts_from: ClassVar = "loss"
    card: ClassVar[Card] = Card(
        title="Random Search as a Baseline for Sparse Neural Network Architecture Search",
        year=2024,
        arxiv="2403.08265",
        system="random_search",
        family="training",
        when="before training",
        start="sparse to sparse",
        masks="static",
        site="hidden units of MLPs and chains; linear weight, convolution",
        score="loss of the untrained network, lowest of many draws",
        pattern="whole hidden units; unstructured, constant fan-in, N:M, block",
        budget="sparsity; the same share of units of every hidden layer",
        schedule="once, before the first update",
        update="training under the mask",
        kernel="masked dense",
        departs="uniform shares over hidden layers; details of the paper were not at hand",
    )
    keeper: ClassVar[type[Sparsifier]] = Searched
    example: ClassVar[Mapping[str, Any]] = {"steps": 2, "batch_size": 3, "draws": 3}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    draws: int = 50
    space: Literal["node", "weight"] = "node"
    trial_steps: int = 0
    trial_lr: float = 0.1
    sample_batches: int = 1
    allocation: Allocation = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("draws", self.draws, 1)
        check_count("trial_steps", self.trial_steps, 0)
        check_count("sample_batches", self.sample_batches, 1)
        check_number("trial_lr", self.trial_lr, above=0.0)
        if self.space not in ("node", "weight"):
            raise unknown("space", self.space, ("node", "weight"))
        shaped = self.pattern != Unstructured("layer") or self.allocation != "uniform"
        if self.space == "node" and shaped:
            raise GossamerError(
                f"space=node removes whole units, the same share of every hidden layer; pattern "
                f"{self.pattern} and allocation {self.allocation} need space=weight"
            )

    @property
    def initial_sparsity(self) -> float:
        return self.final_sparsity

    def sparsity_at(self, update: int) -> float:
        return self.final_sparsity

    def change(self, update: int) -> Change | None:
        """Nothing, ever."""
        return None

    def layers_of(self, model: nn.Module) -> tuple[Layer, ...]:
        layers = super().layers_of(model)
        return unit_layers(model, layers) if self.space == "node" else layers

    def quotas(self, layers: tuple[Layer, ...], sparsity: float) -> dict[str, Quota]:
        inner = [layer for layer in layers if isinstance(layer, UnitLayer)]
        if self.space == "weight":
            return super().quotas(layers, sparsity)
        kept = kept_units(inner, sparsity)
        # With a single unit left everywhere there is nothing more to remove.
        wanted = (1.0 - sparsity) * sum(layer.size for layer in inner)
        last = max(kept.values()) == 1 and weights_kept(inner, kept) > wanted
        return {
            layer.name: Quota(self.pattern, layer.weights(kept), floored=last) for layer in inner
        }

    def first_loss(self, samples: Tokens | Inputs) -> StartLoss | None:
        """Mean loss of the first batches of the training."""
        first = list(islice(batches(samples, self.plan()), self.sample_batches))

        def loss(model: nn.Module) -> Tensor:
            device = next(model.parameters()).device
            with meeting(model, first[0]):
                losses = [
                    own_loss(model, {name: value.to(device) for name, value in batch.items()})
                    for batch in first
                ]
            return torch.stack(losses).mean()

        return loss

    def search(
        self,
        model: nn.Module,
        layers: tuple[Layer, ...],
        quotas: Mapping[str, Quota],
        loss: StartLoss | None,
    ) -> tuple[dict[str, Tensor], Found]:
        """Scores that choose the best draw's masks, and the losses of all draws."""
        measured = needed(self, loss)
        draw = self.drawing(layers, quotas)

        def masks(number: int) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for name, mask in draw(number).items():
                layer = named[name]
                weight = model.get_parameter(layer.parameter)
                whole = found.setdefault(layer.parameter, torch.ones_like(weight, dtype=torch.bool))
                layer.view(whole).copy_(mask)
            return found

        named = {layer.name: layer for layer in layers}
        found = best_of(
            self.draws, masks, model, measured, trial_steps=self.trial_steps, lr=self.trial_lr
        )
        if self.draws > 1 and len(set(found.losses)) == 1:
            # Every draw the same: refuses a loss that no layer reaches.
            with untouched(model), torch.enable_grad():
                gradients_of(measured(model), model, layers)
        best = draw(found.best)
        return {name: mask.float() for name, mask in best.items()}, found

    def drawing(
        self, layers: tuple[Layer, ...], quotas: Mapping[str, Quota]
    ) -> Callable[[int], dict[str, Tensor]]:
        """Function from the number of a draw to the masks of all layers, in their own shape."""
        inner = [layer for layer in layers if isinstance(layer, UnitLayer)]
        counts = kept_units(inner, self.final_sparsity) if self.space == "node" else {}
        sizes = units_of(inner)

        def of_units(number: int) -> dict[str, Tensor]:
            kept = {
                name: topk_mask(self._noise((1, sizes[name]), number, name), count)[0]
                for name, count in counts.items()
            }
            return {layer.name: layer.mask(kept) for layer in inner}

        def of_weights(number: int) -> dict[str, Tensor]:
            return {
                layer.name: quotas[layer.name]
                .pattern.select(
                    self._noise(layer.shape, number, layer.name), quotas[layer.name].budget
                )
                .mask()
                for layer in layers
            }

        return of_units if self.space == "node" else of_weights

    def cost(self, forward: float) -> float:
        """Operations of the search, where a forward pass of one draw takes so many."""
        passes = 1 + 3 * self.trial_steps
        return self.draws * self.sample_batches * passes * forward

    def _noise(self, shape: tuple[int, ...], number: int, name: str) -> Tensor:
        seed = crc32(f"{self.seed}:draw {number}:{name}".encode())
        return uniform_random(torch.empty(shape), seed)
