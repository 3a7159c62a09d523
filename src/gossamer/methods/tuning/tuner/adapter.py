"""Adapter: trainable parameters beside one frozen matrix, at work in its module's place.

The module stays in the model under its own name and keeps its weight; only its ``forward`` is the
adapter's for a while. Names of the model's tensors do not change, and the adapter's are beside them
(``...q_proj.tuning.u``), where ``state_dict``, optimizers and the Trainer find them.
Shapes: O and I sides of the matrix.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MethodType

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Selection, Site, pack_bits, unpack_bits

__all__ = ["CHILD", "Adapter", "displace", "load_tensors", "place", "tensors_of"]

CHILD = "tuning"
"""Name of an adapter in the module whose matrix it stands beside."""


class Adapter(nn.Module, ABC):
    """Trainable parameters beside one frozen (O, I) matrix, and how both together act.

    Parameters are what trains; buffers (masks, indices) are what else must be stored.
    """

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module gives for inputs (..., I): (..., O)."""

    @abstractmethod
    def folded(self, weight: Tensor) -> Tensor:
        """The one matrix (O, I), in the weight's dtype, that acts the same."""

    @property
    def selection(self) -> Selection | None:
        """What stays of the folded matrix; None for all of it."""
        return None


class _Forward(nn.Module):
    """Only a name for what :func:`place` puts into a module; never made."""

    tuning: Adapter
    weight: Tensor
    bias: Tensor | None
    nf: int


def _forward(module: _Forward, x: Tensor) -> Tensor:
    return module.tuning(x, module.weight, module.bias)


def _forward_transposed(module: _Forward, x: Tensor) -> Tensor:
    return module.tuning(x, module.weight.T, module.bias)


def place(model: nn.Module, site: Site, adapter: Adapter) -> None:
    """Let an adapter act in a module's place.

    Raises
    ------
    GossamerError
        If the module's ``forward`` is already another's.
    """
    module = site.owner(model)
    if hasattr(module, CHILD) or "forward" in vars(module):
        raise GossamerError(
            f"{site.name} is already tuned or offloaded; restore that first, or load the model anew"
        )
    adapter.train(module.training)
    module.add_module(CHILD, adapter)
    # Bound, not a closure: a deep copy of the model then calls the copy's own adapter.
    act = _forward_transposed if site.transposed else _forward
    module.forward = MethodType(act, module)


def displace(model: nn.Module, site: Site) -> None:
    """Take an adapter away again; does nothing where there is none."""
    module = site.owner(model)
    if hasattr(module, CHILD):
        delattr(module, CHILD)
        vars(module).pop("forward", None)


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter's parameters and buffers by name, for storing; masks at one bit an entry."""
    found = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
    return {
        name: pack_bits(value) if value.dtype == torch.bool else value.detach().clone()
        for name, value in found.items()
    }


@torch.no_grad()
def load_tensors(adapter: Adapter, tensors: Mapping[str, Tensor], name: str) -> None:
    """Write back what :func:`tensors_of` gave.

    Raises
    ------
    GossamerError
        If a tensor is missing, unknown or of another shape; the message gives ``name``.
    """
    held = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
    if odd := sorted(set(held) ^ set(tensors)):
        raise GossamerError(
            f"the stored tensors of {name} do not fit this method ({', '.join(odd[:3])}); "
            "give the parameters it was saved with"
        )
    for key, own in held.items():
        value = tensors[key]
        if own.dtype == torch.bool:
            value = unpack_bits(value, tuple(own.shape))
        if value.shape != own.shape:
            raise GossamerError(
                f"the stored {key} of {name} has shape {tuple(value.shape)}, here it is "
                f"{tuple(own.shape)}; give the model and the parameters it was saved with"
            )
        own.copy_(value)
