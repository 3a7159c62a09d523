"""Which matrices a sparse training works on, and how many weights each of them keeps.

Shapes: (O, I) for linear layers, however they are stored; (O, I, kernel sides) for convolutions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal, get_args

from torch import Tensor, nn

from gossamer.core import (
    NM,
    Block,
    Budget,
    GossamerError,
    Pattern,
    Unstructured,
    UnsupportedModel,
    kept_count,
    unknown,
)
from gossamer.core import allocate as split
from gossamer.methods.training.sparsifier.layout import everywhere, here, is_sharded
from gossamer.models import find_sites

__all__ = ["Allocation", "Layer", "Quota", "find_layers", "other_weights", "plain_module", "quotas"]

Allocation = Literal["uniform", "uniform_plus", "er", "erk"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A weight that is kept sparse.

    Parameters
    ----------
    parameter : path of the parameter. transposed : it is stored (I, O).
    expert : index into a stacked parameter, or None.
    """

    name: str
    role: str
    block: int
    parameter: str
    shape: tuple[int, ...]
    transposed: bool = False
    expert: int | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    def view(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the parameter's shape that belongs to this layer, as (O, I)."""
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor.T if self.transposed else tensor


def plain_module(model: nn.Module, what: str = "the model") -> nn.Module:
    """The model itself, without what distributes or compiles it.

    Raises
    ------
    GossamerError
        If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise GossamerError(
            f"{what} is {model!r}, a {type(model).__name__}; give a torch.nn.Module, such as "
            "load_model(folder).model"
        )
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_layers(model: nn.Module, skip: str = "") -> tuple[Layer, ...]:
    """The matrices of a transformer's blocks; of any other module its linear layers and
    convolutions, those that share a weight with an embedding left out.

    Parameters
    ----------
    skip : roles, halves of roles, or names with wildcards, separated by commas: left dense.

    Raises
    ------
    GossamerError
        If nothing is left, or a word of ``skip`` matches nothing.
    """
    layers = _sites(model)
    if layers is None:
        layers = _modules(model)
    words = [word.strip() for word in skip.split(",") if word.strip()]
    dropped: set[str] = set()
    for word in words:
        found = {
            layer.name
            for layer in layers
            if word in (layer.role, layer.role.partition(".")[0]) or fnmatchcase(layer.name, word)
        }
        if not found:
            raise unknown("layer to skip", word, [layer.name for layer in layers])
        dropped |= found
    left = tuple(layer for layer in layers if layer.name not in dropped)
    if not left:
        raise GossamerError(f"{type(model).__name__} has no linear layer left to make sparse")
    for layer in left:
        weight: Any = model.get_parameter(layer.parameter)
        finite = bool(here(weight).isfinite().all())
        if is_sharded(weight):
            finite = everywhere(finite, weight.device_mesh.device_type)
        if not finite:
            raise GossamerError(
                f"{layer.name} holds NaN or infinite weights, which have no rank; "
                "start from finite weights"
            )
    return left


def _sites(model: nn.Module) -> list[Layer] | None:
    try:
        sites = find_sites(model).sites
    except UnsupportedModel:
        return None
    return [
        Layer(
            site.name,
            site.role,
            site.block,
            f"{site.module}.{site.parameter}",
            site.shape,
            site.transposed,
            site.expert,
        )
        for site in sites
        if site.role != "experts.router"
    ]


def _modules(model: nn.Module) -> list[Layer]:
    seen = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers: list[Layer] = []
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS) or id(module.weight) in seen:
            continue
        if "weight" not in module._parameters:
            raise GossamerError(
                f"{name}.weight is computed (a parametrisation), so zeros in it do not last; "
                "remove the parametrisation or skip the layer"
            )
        seen.add(id(module.weight))
        role = "linear" if isinstance(module, nn.Linear) else "convolution"
        path = f"{name}.weight" if name else "weight"
        shape = tuple(module.weight.shape)
        layers.append(Layer(name or type(module).__name__.lower(), role, 0, path, shape))
    return layers


def other_weights(model: nn.Module, covered: Iterable[Tensor]) -> int:
    """Number of weights of linear layers and convolutions that are none of the covered ones."""
    known = {id(weight) for weight in covered}
    modules = (module for module in model.modules() if isinstance(module, _KINDS))
    return sum(module.weight.numel() for module in modules if id(module.weight) not in known)


@dataclass(frozen=True)
class Quota:
    """What a layer keeps.

    Parameters
    ----------
    pattern : the allowed shape inside the layer. keep : entries (or tiles) of each of its groups.
    floored : the sparsity asked for would have emptied a group.
    """

    pattern: Pattern
    keep: int
    floored: bool = False

    @property
    def budget(self) -> Budget:
        """As a budget."""
        return Budget(keep=self.keep)


def quotas(
    layers: tuple[Layer, ...], pattern: Pattern, allocation: Allocation, sparsity: float
) -> dict[str, Quota]:
    """Split one sparsity over layers; no group of a layer is left empty.

    Raises
    ------
    GossamerError
        If a layer cannot take the pattern; the message names it.
    """
    if allocation not in get_args(Allocation):
        raise unknown("allocation", allocation, get_args(Allocation))
    shapes = {layer.name: layer.shape for layer in layers}
    for layer in layers:
        _check_shape(layer, pattern)
    rule = {
        "uniform": split.uniform,
        "uniform_plus": split.uniform_plus,
        "er": split.er,
        "erk": split.erk,
    }[allocation]
    shares: Mapping[str, float] = rule(shapes, sparsity)
    if isinstance(pattern, NM) and allocation != "uniform":
        shares = split.grouped(shares, {layer.name: layer.size for layer in layers}, pattern.of)
    return {layer.name: _quota(layer, pattern, shares[layer.name]) for layer in layers}


def _check_shape(layer: Layer, pattern: Pattern) -> None:
    if len(layer.shape) > 2 and not isinstance(pattern, Unstructured):
        raise GossamerError(
            f"{layer.name}: pattern {pattern} needs a matrix, this is a convolution of shape "
            f"{layer.shape}; use pattern layer or row, or skip it"
        )
    try:
        pattern.check_shape(layer.shape)
    except GossamerError as error:
        raise GossamerError(f"{layer.name}: {error}") from None


def _quota(layer: Layer, pattern: Pattern, sparsity: float) -> Quota:
    if isinstance(pattern, NM):
        keep = min(max(round((1.0 - sparsity) * pattern.of), 1), pattern.of)
        return Quota(NM(keep, pattern.of), keep)
    if pattern == Unstructured("model"):
        pattern = Unstructured("layer")
    if isinstance(pattern, Block):
        group = layer.size // (pattern.high * pattern.wide)
    elif pattern == Unstructured("row"):
        group = prod(layer.shape[1:])
    else:
        group = layer.size
    keep = kept_count(group, sparsity)
    return Quota(pattern, max(keep, 1), floored=keep < 1)
