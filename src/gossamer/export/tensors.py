"""Tensors of a model as an export takes them: tied ones once, matrices told from the rest."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.core import GossamerError, UnsupportedModel
from gossamer.models import find_sites

__all__ = ["FLOATS", "Source", "build_class", "check_model", "matrix", "sources", "unmatrix"]

FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Source:
    """One tensor to store.

    Parameters
    ----------
    tensor : on the CPU, contiguous. aliases : further names of the same tensor.
    site : a prunable matrix of the model, rather than an embedding, a norm or a buffer.
    transposed : the input dimension is the last but one, as in GPT-2's Conv1D.
    """

    name: str
    tensor: Tensor
    aliases: tuple[str, ...] = ()
    site: bool = False
    transposed: bool = False

    @property
    def is_matrix(self) -> bool:
        """Something a layout could compress: two or more dimensions of floats."""
        return self.tensor.dim() > 1 and self.tensor.dtype in FLOATS and self.tensor.numel() > 0


def matrix(tensor: Tensor, transposed: bool) -> Tensor:
    """A tensor as rows (R, C); stacks of matrices are put below one another."""
    turned = tensor.transpose(-1, -2) if transposed else tensor
    return turned.reshape(-1, turned.shape[-1]).contiguous()


def unmatrix(rows: Tensor, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """Undo :func:`matrix` for a tensor of the given shape."""
    if not transposed:
        return rows.view(shape)
    turned = (*shape[:-2], shape[-1], shape[-2])
    return rows.view(turned).transpose(-1, -2).contiguous()


def build_class(name: Any) -> type[PreTrainedModel]:
    """The model class of that name in transformers; nothing else is ever built.

    Raises
    ------
    GossamerError
        If there is none.
    """
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise GossamerError(
            f"transformers {transformers.__version__} has no model class {name!r}, so the model "
            "cannot be built from its configuration"
        )
    return found


def check_model(model: nn.Module) -> None:
    """Refuse a model that could not be built again from its configuration.

    Raises
    ------
    GossamerError
        If it is no transformers model, is quantised, or has modules its class does not have.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or build_class(name) is not type(model):
        raise GossamerError(f"{name} is not a class of transformers, so an export cannot name it")
    if getattr(model.config, "quantization_config", None) is not None:
        raise GossamerError(
            "the model's weights are quantised, which no sparse format here stores; export the "
            "model they were made from"
        )
    with torch.device("meta"):
        expected = set(type(model)(deepcopy(model.config)).state_dict())
    found = set(model.state_dict())
    for word, names in (("lacks", expected - found), ("also has", found - expected)):
        if names:
            raise GossamerError(
                f"the model {word} {sorted(names)[0]}, which a {name} would not; undo what was "
                "attached to it (restore) and export again"
            )


def _orientation(model: nn.Module) -> dict[str, bool]:
    """Names of the tensors that hold sites, and whether they are stored transposed."""
    try:
        sites = find_sites(model).sites
    except UnsupportedModel:
        return {}
    return {f"{s.module}.{s.parameter}": s.transposed for s in sites if s.role != "experts.router"}


def sources(model: nn.Module, dtype: torch.dtype | None) -> list[Source]:
    """Every tensor of a model once, in order.

    Parameters
    ----------
    dtype : floats are cast to it; None keeps what they are.
    """
    names: dict[tuple[Any, ...], list[str]] = {}
    state: Mapping[str, Tensor] = model.state_dict()
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            raise GossamerError(f"{name} is not in memory; load the whole model first")
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        own = place if tensor.numel() else (name,)
        names.setdefault(own, []).append(name)
    oriented = _orientation(model)
    made = []
    for first, *aliases in names.values():
        tensor = state[first].detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        site = next((n for n in (first, *aliases) if n in oriented), None)
        made.append(
            Source(
                first,
                tensor.cpu().contiguous(),
                tuple(aliases),
                site is not None if oriented else tensor.dim() > 1,
                site is not None and oriented[site],
            )
        )
    return made
