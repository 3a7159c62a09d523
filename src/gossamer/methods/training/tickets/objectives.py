"""What a search for masks minimises: how far the masked network is from the dense one.

Every objective is a function of (network, batch, masks); masks are relaxed, in [0, 1].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, mse_loss

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.layers import Layer
from gossamer.methods.training.tickets.balance import norm
from gossamer.methods.training.tickets.looking import SearchData

__all__ = ["OBJECTIVES", "Frozen", "Objective", "Objectives", "reverse_kl", "standardised"]

Objectives = Literal["kl", "task", "ratio", "norm", "features", "gradients"]


def reverse_kl(sparse: Tensor, dense: Tensor) -> Tensor:
    """KL(sparse ‖ dense), the mean over positions, in nats.

    Parameters
    ----------
    sparse, dense : logits (..., classes).
    """
    # kl_div(a, b) is KL(b ‖ a): what comes first there is the second distribution.
    ours, theirs = sparse.log_softmax(-1), dense.log_softmax(-1)
    return kl_div(theirs, ours, reduction="none", log_target=True).sum(-1).mean()


def standardised(values: Tensor, side: int | None = None) -> Tensor:
    """Mean 0 and standard deviation 1 along the last side, or over everything if None."""
    values = values.float() if values.element_size() < 4 else values
    if side is None:
        mean, std = values.mean(), values.std()
    else:
        mean, std = values.mean(side, keepdim=True), values.std(side, keepdim=True)
    return (values - mean) / (std + 1e-9)


class Frozen:
    """A network whose layers can be put behind masks; its weights do not change.

    Parameters
    ----------
    layers : behind masks. data : says what the network makes of a batch.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], data: SearchData) -> None:
        self.model = model
        self.layers = layers
        self.data = data
        self.weights = {layer.parameter: model.get_parameter(layer.parameter) for layer in layers}
        paths = {id(weight): path for path, weight in self.weights.items()}
        # A weight may be used in more places than the one that names its layer.
        self._places = [
            (module._parameters, name, paths[id(weight)])
            for module in model.modules()
            for name, weight in module._parameters.items()
            if id(weight) in paths
        ]

    @contextmanager
    def behind(self, masks: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the network computes with mask times weight."""
        seen = {p: (m * self.weights[p]).to(self.weights[p].dtype) for p, m in masks.items()}
        try:
            for parameters, name, path in self._places:
                cast(dict[str, Any], parameters)[name] = seen[path]
            yield
        finally:
            for parameters, name, path in self._places:
                parameters[name] = self.weights[path]

    def loss(self, batch: Any) -> Tensor:
        """Loss of the network as it is."""
        return self.data.loss(self.model, batch)

    def logits(self, batch: Any) -> Tensor:
        """Logits of the network as it is."""
        return self.data.logits(self.model, batch)

    def features(self, batch: Any) -> list[Tensor]:
        """Standardised outputs of every layer: of positions, or of whole images after convolutions.

        Raises
        ------
        GossamerError
            If no layer has a module of its own (stacked experts).
        """
        found: list[Tensor] = []

        def watch(module: nn.Module, _: Any, output: Tensor) -> None:
            flat = output if output.dim() < 4 else output.flatten(1)
            found.append(standardised(flat, -1))

        own = [layer.parameter.rpartition(".")[0] for layer in self.layers if layer.expert is None]
        if not own:
            raise GossamerError("stacked experts have no outputs to compare; use objective kl")
        handles = [
            self.model.get_submodule(name).register_forward_hook(watch)
            for name in dict.fromkeys(own)
        ]
        try:
            self.logits(batch)
        finally:
            for handle in handles:
                handle.remove()
        return found


@dataclass(frozen=True)
class Objective:
    """One of :data:`OBJECTIVES`.

    Parameters
    ----------
    value : (network, batch, masks) to a scalar to minimise.
    forwards : its cost, gradient included, in forward passes of the dense network.
    by_weights : it needs gradients with respect to weights.
    """

    value: Callable[[Frozen, Any, Mapping[str, Tensor]], Tensor]
    forwards: float
    by_weights: bool = False


def _kl(net: Frozen, batch: Any, masks: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        dense = net.logits(batch)
    with net.behind(masks):
        return reverse_kl(net.logits(batch), dense)


def _task(net: Frozen, batch: Any, masks: Mapping[str, Tensor]) -> Tensor:
    with net.behind(masks):
        return net.loss(batch)


def _ratio(net: Frozen, batch: Any, masks: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        dense = net.loss(batch)
    with net.behind(masks):
        return (net.loss(batch) / dense - 1.0).abs()


def _features(net: Frozen, batch: Any, masks: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        dense = net.features(batch)
    with net.behind(masks):
        sparse = net.features(batch)
    parts = [mse_loss(ours, theirs) for ours, theirs in zip(sparse, dense, strict=True)]
    return torch.stack(parts).mean()


def _norm(net: Frozen, batch: Any, masks: Mapping[str, Tensor]) -> Tensor:
    weights = [p for p in net.model.parameters() if p.requires_grad]
    with net.behind(masks):
        loss = net.loss(batch)
    found = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    return -norm([gradient for gradient in found if gradient is not None])


def _gradients(net: Frozen, batch: Any, masks: Mapping[str, Tensor]) -> Tensor:
    weights = list(net.weights.values())
    dense = torch.autograd.grad(net.loss(batch), weights)
    with net.behind(masks):
        loss = net.loss(batch)
    sparse = torch.autograd.grad(loss, weights, create_graph=True)
    parts = [
        mse_loss(standardised(ours), standardised(theirs))
        for ours, theirs in zip(sparse, dense, strict=True)
    ]
    return torch.stack(parts).mean()


OBJECTIVES: dict[str, Objective] = {
    "kl": Objective(_kl, 4.0),
    "task": Objective(_task, 3.0),
    "ratio": Objective(_ratio, 4.0),
    # Differentiating a gradient costs twice what it took to compute it.
    "norm": Objective(_norm, 9.0, by_weights=True),
    "features": Objective(_features, 4.0),
    "gradients": Objective(_gradients, 12.0, by_weights=True),
}
