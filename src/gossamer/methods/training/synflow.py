"""SynFlow: before training and without data, prune in rounds so that no layer dies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from gossamer.core import Budget, Card, GossamerError, Unstructured, check_count, kept_count
from gossamer.methods.training.at_start.scored import AtStart, gradients_of, needed
from gossamer.methods.training.base import StartLoss
from gossamer.methods.training.sparsifier.layers import Layer
from gossamer.models import Inputs, Tokens, context_length
from gossamer.models.fit import batches
from gossamer.models.loading import first_line

__all__ = ["SynFlow"]


@dataclass(frozen=True, kw_only=True)
class SynFlow(AtStart):
    """Prune an untrained network by the flow through each weight, in rounds, then train it.

    All parameters and buffers are replaced by their absolute values, in float64; the flow R is the
    sum of the outputs for an input of ones; a weight scores |w · ∂R/∂w|. Round i of n keeps the
    density ρ^(i/n), so layers lose weights in step with their flow. ``attach`` takes as ``loss`` a
    function of the model that gives R where the model's input is no vector of its first layer's
    width; a language model is fed embeddings of ones.

    Parameters
    ----------
    rounds : 1 is one shot, which may leave a layer next to nothing.

    Source: arXiv 2006.05467, §6, algorithm 1.

    Departs from the paper: with other patterns than ``model`` the rounds only refine the scores;
    models with stacked experts are scored in float32.
    """

    card: ClassVar[Card] = Card(
        title="Pruning neural networks without any data by iteratively conserving synaptic flow",
        year=2020,
        arxiv="2006.05467",
        family="training",
        when="before training",
        start="sparse to sparse",
        masks="static",
        site="linear weight, convolution",
        score="|w · ∂R/∂w|, R the flow of |weights|",
        pattern="unstructured, constant fan-in, N:M, block",
        budget="sparsity; one competition of all layers",
        schedule="rounds before the first update, exponential",
        update="training under the mask",
        kernel="masked dense",
        departs="in patterns of layers rounds only refine the scores; stacked experts in float32",
    )
    example: ClassVar = {"steps": 2, "batch_size": 3, "rounds": 3}

    rounds: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rounds", self.rounds, 1)

    def first_loss(self, samples: Tokens | Inputs) -> StartLoss | None:
        """The flow of ones in place of the first batch's pixels or embeddings."""
        first = next(batches(samples, self.plan()))

        def flow(model: nn.Module) -> Tensor:
            given: dict[str, Tensor] = {}
            for name, value in first.items():
                if name == "input_ids":
                    given["inputs_embeds"] = _ones_for(model, value.shape[1])
                elif value.is_floating_point():
                    given[name] = torch.ones_like(value[:1])
            like = next(p for p in model.parameters() if p.is_floating_point())
            return _flow(model, **{name: value.to(like) for name, value in given.items()})

        return flow

    def scores(
        self, model: nn.Module, layers: tuple[Layer, ...], loss: StartLoss | None
    ) -> dict[str, Tensor]:
        flow = _flow_of_ones(layers) if loss is None else needed(self, loss)
        total = sum(layer.size for layer in layers)
        found: dict[str, Tensor] = {}
        # The grouped product of stacked experts has no form in float64.
        stacked = any(layer.expert is not None for layer in layers)
        with _absolute(model, torch.float32 if stacked else torch.float64):
            for turn in range(1, self.rounds + 1):
                gradients = gradients_of(flow(model), model, layers)
                left = {
                    layer.name: layer.view(model.get_parameter(layer.parameter).detach())
                    for layer in layers
                }
                # Removed in an earlier round: below every weight that is left.
                found = {
                    layer.name: torch.where(
                        left[layer.name] == 0,
                        -1.0,
                        left[layer.name] * layer.view(gradients[layer.parameter]).abs(),
                    )
                    for layer in layers
                }
                if turn == self.rounds:
                    break
                density = (1.0 - self.final_sparsity) ** (turn / self.rounds)
                keep = kept_count(total, 1.0 - density)
                chosen = Unstructured("model").select_model(found, Budget(keep=keep))
                for name, selection in chosen.items():
                    left[name].masked_fill_(~selection.mask(), 0)
        return found


def _flow_of_ones(layers: tuple[Layer, ...]) -> StartLoss:
    def flow(model: nn.Module) -> Tensor:
        weight = model.get_parameter(layers[0].parameter)
        if _reads_tokens(model):
            length = min(8, context_length(model) or 8)
            return _flow(model, inputs_embeds=_ones_for(model, length).to(weight))
        if len(layers[0].shape) != 2:
            raise GossamerError(
                "the flow through a convolution needs the size of its input; attach with loss=, "
                "such as lambda net: net(torch.ones(1, 3, 32, 32, dtype=torch.float64)).sum()"
            )
        return _flow(model, torch.ones(1, layers[0].shape[1]).to(weight))

    return flow


def _reads_tokens(model: nn.Module) -> bool:
    """Whether a model takes embeddings in the place of token ids."""
    try:
        return isinstance(cast("Any", model).get_input_embeddings(), nn.Embedding)
    except (AttributeError, NotImplementedError):
        return False


def _ones_for(model: Any, length: int) -> Tensor:
    return torch.ones(1, length, model.get_input_embeddings().weight.shape[1])


def _flow(model: nn.Module, *given: Tensor, **named: Tensor) -> Tensor:
    """The sum of a model's outputs."""
    try:
        output = model(*given, **named)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise GossamerError(
            f"{type(model).__name__} takes no input of ones ({first_line(error)}); attach with "
            "loss=, a function of the model to the sum of its outputs for an input of ones"
        ) from error
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    if not isinstance(output, Tensor):
        raise GossamerError(
            f"{type(model).__name__} gives a {type(output).__name__} without logits; attach with "
            "loss=, a function of the model to the sum of its outputs for an input of ones"
        )
    return output.sum()


@contextmanager
def _absolute(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Absolute values of all parameters and buffers; in float64, since products of layers overflow
    what float32 can hold.
    """
    held = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    before = [t.data for t in held]
    try:
        for tensor in held:
            tensor.data = tensor.data.to(dtype).abs()
        yield
    finally:
        for tensor, value in zip(held, before, strict=True):
            tensor.data = value
