"""Activity: what the units on both sides of every layer do while the model trains.

Shapes: N samples (tokens count as samples), I units before a layer, O units behind it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer.core import UnsupportedModel
from gossamer.methods.training.sparsifier.layers import Layer, find_layers
from gossamer.models.collect import expert_activation

__all__ = ["Heard", "listen"]

Heard = Callable[[str, Tensor, Tensor], None]
"""Gets the name of a layer, (N, I) before it and (N, O) behind it."""


def listen(
    model: nn.Module, layers: tuple[Layer, ...], wanted: Callable[[], bool], heard: Heard
) -> list[Any]:
    """Hook the modules of the layers.

    Parameters
    ----------
    wanted : asked at every forward pass; passes without gradients are no training and not heard.

    Returns
    -------
    Handles, to be removed.
    """

    def now() -> bool:
        return torch.is_grad_enabled() and wanted()

    handles: list[Any] = []
    stacked: set[str] = set()
    for layer in layers:
        path = layer.parameter.rpartition(".")[0]
        if layer.expert is not None:
            stacked.add(path)
            continue
        module = model.get_submodule(path)
        handles.append(module.register_forward_hook(_hook(layer.name, now, heard)))
    names = {layer.name for layer in layers}
    # What an expert's last matrix reads follows from its first, also where that is left dense.
    every = find_layers(model) if stacked else ()
    for path in stacked:
        pairs: dict[int, dict[str, Layer]] = {}
        for layer in every:
            if layer.expert is not None and layer.parameter.rpartition(".")[0] == path:
                pairs.setdefault(layer.expert, {})[layer.role] = layer
        hook = _experts_hook(list(pairs.values()), names, now, heard)
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _hook(name: str, now: Callable[[], bool], heard: Heard) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if now():
            heard(name, _rows(args[0]), _rows(output))

    return hook


def _experts_hook(
    pairs: list[dict[str, Layer]], names: set[str], now: Callable[[], bool], heard: Heard
) -> Any:
    """Experts compute in one call; what each of them does is computed beside it."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not now():
            return
        values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        chosen = [v for v in values if not v.dtype.is_floating_point]
        if len(chosen) != 1:
            raise UnsupportedModel(
                f"{type(module).__name__} takes no token-to-expert indices, so its units cannot be "
                "heard; skip=experts leaves them dense"
            )
        rows = _rows(values[0])
        index = chosen[0].reshape(len(rows), -1)
        with torch.no_grad():
            for pair in pairs:
                first, last = pair["experts.gate_up"], pair["experts.down"]
                own = rows[(index == first.expert).any(1)]
                inner = _through(module, first, own)
                if first.name in names:
                    heard(first.name, own, inner)
                if last.name in names:
                    units = expert_activation(module, inner)
                    heard(last.name, units, _through(module, last, units))

    return hook


def _through(module: nn.Module, layer: Layer, rows: Tensor) -> Tensor:
    """What one expert's matrix makes of its input."""
    assert layer.expert is not None
    name = layer.parameter.rpartition(".")[2]
    stored = getattr(module, name)[layer.expert]
    bias = getattr(module, f"{name}_bias", None)
    return linear(
        rows,
        stored.T if layer.transposed else stored,
        None if bias is None else bias[layer.expert],
    )
