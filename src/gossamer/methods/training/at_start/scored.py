"""What methods share that score an untrained network, choose masks once, and train under them."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.core import GossamerError, Pattern, Unstructured
from gossamer.methods.training.base import Change, SparseTraining, StartLoss
from gossamer.methods.training.sparsifier.layers import Layer
from gossamer.methods.training.sparsifier.layout import here, mean_everywhere, shards_itself

__all__ = ["AtStart", "gradients_of", "needed", "untouched"]


@dataclass(frozen=True, kw_only=True)
class AtStart(SparseTraining):
    """Base of the methods that prune at initialisation: a score, one selection, static masks.

    Parameters
    ----------
    pattern : ``"model"`` lets all layers compete, as in the papers.
    invert : keep the lowest scores instead: a check of whether a score says anything.
    """

    patterns: ClassVar[tuple[str, ...]] = ("model", "layer", "row", "N:M", "block")
    example: ClassVar[Mapping[str, Any]] = {"steps": 2, "batch_size": 3}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "training changes the weights at any sparsity",
        "encoders": "the tiny encoders' data has no labels, so there is no loss to train on",
    }

    pattern: Pattern = Unstructured(per="model")
    invert: bool = False

    scores_shards: ClassVar[bool] = False
    """Whether a model sharded by ``fully_shard`` can be scored."""

    @abstractmethod
    def scores(
        self, model: nn.Module, layers: tuple[Layer, ...], loss: StartLoss | None
    ) -> dict[str, Tensor]:
        """Scores of every layer in its own shape; higher means keep.

        The model is in evaluation mode, and its weights, gradients and random state are put back
        by the caller.
        """

    @property
    def initial_sparsity(self) -> float:
        return self.final_sparsity

    def sparsity_at(self, update: int) -> float:
        return self.final_sparsity

    def change(self, update: int) -> Change | None:
        """Nothing, ever."""
        return None

    def start_scores(
        self, model: nn.Module, layers: tuple[Layer, ...], loss: StartLoss | None
    ) -> dict[str, Tensor]:
        """The scores, or their negatives if inverted."""
        stacked = any(layer.expert is not None for layer in layers)
        if shards_itself(model) and (stacked or not self.scores_shards):
            raise GossamerError(
                f"{self.key()} does not score {'experts in ' if stacked else ''}parameters sharded "
                "by fully_shard; attach before sharding, keep its state_dict(), and attach again "
                "with state= after it"
            )
        with untouched(model), torch.enable_grad():
            found = self.scores(model, layers, loss)
        return {name: -score if self.invert else score for name, score in found.items()}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and differentiable attention inside; modes and gradients put back."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        model.eval()
        # Only the plain form of attention can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng([]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient


def needed(method: SparseTraining, loss: StartLoss | None) -> StartLoss:
    """The loss, checked whenever it is called, or what to do about its absence.

    Raises
    ------
    GossamerError
        If there is none, or it is no function to one number that depends on the weights.
    """
    if loss is None:
        raise GossamerError(
            f"{method.key()} looks at the loss of the network as it is; attach with loss=, a "
            "function of the model that gives the loss of a batch or a few"
        )
    if not callable(loss):
        raise _refused(f"{loss!r}, which is no function of the model")

    def checked(model: nn.Module) -> Tensor:
        value: object = loss(model)
        if not isinstance(value, Tensor):
            raise _refused(f"a {type(value).__name__}")
        if value.numel() != 1 or not value.is_floating_point():
            raise _refused(f"{value.dtype} of shape {tuple(value.shape)}")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise _refused("a constant")
        return value.squeeze()

    return checked


def _refused(what: str) -> GossamerError:
    return GossamerError(
        f"loss= must return one number that depends on the weights; got {what}: give a function "
        "such as lambda net: net(**batch).loss"
    )


def gradients_of(
    value: Tensor, model: nn.Module, layers: tuple[Layer, ...], *, create_graph: bool = False
) -> dict[str, Tensor]:
    """Gradients of a scalar by parameter, for every parameter that holds a layer.

    Where processes train together, the mean of theirs; of sharded parameters the part that is here.

    Raises
    ------
    GossamerError
        If the scalar is no finite number, or depends on none of them.
    """
    paths = list(dict.fromkeys(layer.parameter for layer in layers))
    if not isfinite(float(value.detach())):
        raise _refused(f"{float(value.detach())}")
    if shards_itself(model):
        # Reduction fills the shards' gradients, and only a whole backward pass runs it; until then
        # some modules may hold whole parameters in their place.
        value.backward()
        weights = [model.get_parameter(path) for path in paths]
        return {
            path: torch.zeros_like(here(weight)) if weight.grad is None else here(weight.grad)
            for path, weight in zip(paths, weights, strict=True)
        }
    weights = [model.get_parameter(path) for path in paths]
    found = torch.autograd.grad(value, weights, create_graph=create_graph, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise _refused(f"one that reaches none of the {len(paths)} layers to prune")
    gradients = {
        path: torch.zeros_like(weight) if gradient is None else gradient
        for path, weight, gradient in zip(paths, weights, found, strict=True)
    }
    return gradients if create_graph else {k: mean_everywhere(v) for k, v in gradients.items()}
