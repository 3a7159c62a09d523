"""Hidden units of a network: which rows of which matrix, and which columns of the next, are one.

Removing a unit removes its row of every matrix that feeds it and its column of every matrix that
reads it; its bias is then multiplied by zeros. Shapes: (O, I, kernel sides).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, UnsupportedModel
from gossamer.methods.training.sparsifier.layers import Layer
from gossamer.models import find_sites

__all__ = ["Side", "UnitLayer", "kept_units", "unit_layers", "units_of", "weights_kept"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What acts on every unit apart from all others, so that a unit stays one behind it.
_APART = (
    *(getattr(nn, name) for name in ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "SELU", "CELU")),
    *(getattr(nn, name) for name in ("GELU", "SiLU", "Mish", "Tanh", "Sigmoid", "Softplus")),
    *(getattr(nn, name) for name in ("Hardtanh", "Hardswish", "Hardsigmoid", "Softsign")),
    *(
        getattr(nn, f"{name}{d}d")
        for name in ("BatchNorm", "MaxPool", "AvgPool")
        for d in (1, 2, 3)
    ),
    *(getattr(nn, f"Adaptive{n}Pool{d}d") for n in ("Max", "Avg") for d in (1, 2, 3)),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Upsample),
)


@dataclass(frozen=True)
class Side:
    """Whose units the rows or the columns of a matrix are: place p is of unit p // each % units.

    Parameters
    ----------
    hidden : name of the hidden layer: that of the first matrix that feeds it.
    units : of the hidden layer. each : neighbouring places of one unit, for example the pixels
        of a flattened channel; places beyond units x each begin anew with the first unit.
    """

    hidden: str
    units: int
    each: int = 1

    def of(self, kept: Tensor, size: int) -> Tensor:
        """(size,) places that stay with the kept units, (units,) bool."""
        return kept[(torch.arange(size) // self.each) % self.units]

    def places(self, kept: int, size: int) -> int:
        """How many of the places stay with so many units."""
        return size // self.units * kept


@dataclass(frozen=True)
class UnitLayer(Layer):
    """A matrix between hidden layers.

    Parameters
    ----------
    rows, columns : the hidden layers it feeds and reads; None where they are in- or outputs.
    """

    rows: Side | None = None
    columns: Side | None = None

    def mask(self, kept: Mapping[str, Tensor]) -> Tensor:
        """What stays of the matrix with the kept units of every hidden layer; bool."""
        ones = torch.ones(self.shape, dtype=torch.bool)
        for axis, side in enumerate((self.rows, self.columns)):
            if side is not None:
                shape = [1] * len(self.shape)
                shape[axis] = -1
                ones = ones & side.of(kept[side.hidden], self.shape[axis]).view(shape)
        return ones

    def weights(self, kept: Mapping[str, int]) -> int:
        """How many weights stay with so many units of every hidden layer."""
        size = self.size
        for axis, side in enumerate((self.rows, self.columns)):
            if side is not None:
                size = size // self.shape[axis] * side.places(kept[side.hidden], self.shape[axis])
        return size


def units_of(layers: Iterable[UnitLayer]) -> dict[str, int]:
    """Number of units of every hidden layer, by name."""
    sides = (side for layer in layers for side in (layer.rows, layer.columns))
    return {side.hidden: side.units for side in sides if side is not None}


def weights_kept(layers: Iterable[UnitLayer], kept: Mapping[str, int]) -> int:
    """Weights that stay with so many units of every hidden layer."""
    return sum(layer.weights(kept) for layer in layers)


def kept_units(layers: Sequence[UnitLayer], sparsity: float) -> dict[str, int]:
    """The same share of every hidden layer, at least one unit, that comes nearest to a sparsity.

    A matrix between two hidden layers loses rows and columns, so that the share of units removed
    is below the share of weights removed.
    """
    sizes = units_of(layers)
    wanted = (1.0 - sparsity) * sum(layer.size for layer in layers)

    def at(share: float) -> dict[str, int]:
        return {name: max(1, round(share * units)) for name, units in sizes.items()}

    low, high = 0.0, 1.0
    # Counts rise with the share in steps; the step that passes the wanted one is enclosed.
    while high - low > 1e-9:
        middle = (low + high) / 2.0
        low, high = (low, middle) if weights_kept(layers, at(middle)) >= wanted else (middle, high)
    return min((at(low), at(high)), key=lambda kept: abs(weights_kept(layers, kept) - wanted))


def unit_layers(model: nn.Module, layers: tuple[Layer, ...]) -> tuple[UnitLayer, ...]:
    """The layers that have hidden units on a side, with what those are.

    Parameters
    ----------
    layers : of the model. A hidden layer counts if all matrices around it are among them.

    Raises
    ------
    GossamerError
        If no hidden units are found, or a module between them mixes units.
    """
    try:
        sides = _inner_neurons(model)
    except UnsupportedModel:
        sides = _chain(model)
    around: dict[str, set[str]] = {}
    for path, pair in sides.items():
        for side in pair:
            if side is not None:
                around.setdefault(side.hidden, set()).add(path)
    given = {layer.name for layer in layers}
    whole = {hidden for hidden, paths in around.items() if paths <= given}

    def own(side: Side | None) -> Side | None:
        return side if side is not None and side.hidden in whole else None

    found: list[UnitLayer] = []
    for layer in layers:
        rows, columns = map(own, sides.get(layer.name, (None, None)))
        if rows is not None or columns is not None:
            values = {field.name: getattr(layer, field.name) for field in fields(Layer)}
            found.append(UnitLayer(**values, rows=rows, columns=columns))
    if not found:
        raise GossamerError(
            f"{type(model).__name__} has no hidden units between two of its layers; "
            "search over weights (space=weight)"
        )
    return tuple(found)


Sides = dict[str, tuple[Side | None, Side | None]]


def _inner_neurons(model: nn.Module) -> Sides:
    """Inner neurons of the MLPs and experts of a transformer's blocks."""
    sites = find_sites(model).sites
    known = {site.name: site for site in sites}
    sides: Sides = {}
    for down in sites:
        if down.role not in ("mlp.down", "experts.down"):
            continue
        mates = [known[name] for name in down.coupled if known[name].role != "experts.router"]
        units = down.shape[1]
        if not mates or any(mate.shape[0] % units for mate in mates):
            continue
        hidden = mates[0].name
        sides[down.name] = None, Side(hidden, units)
        for mate in mates:
            each = 1 if mate.shape[0] == units else _neighbours(model.get_submodule(mate.module))
            sides[mate.name] = Side(hidden, units, each), None
    return sides


@torch.no_grad()
def _neighbours(module: Any) -> int:
    """How many neighbouring rows of a packed gate and up matrix belong to one neuron.

    All of transformers' packed matrices hold the gate's rows first and up's after them, but for
    those whose gating function takes them alternately; it is asked.
    """
    gating = getattr(module, "_apply_gate", None)
    if gating is None:
        return 1
    rows = torch.ones(2, 4)
    rows[1, 1] = 2.0
    alone, changed = gating(rows)[:, 0].tolist()
    return 1 if alone == changed else 2


def _chain(model: nn.Module) -> Sides:
    """Hidden units of a chain of linear layers and convolutions."""
    sides: Sides = {}
    at: Side | None = None
    last: nn.Module | None = None
    flat = True
    for name, module in _leaves(model):
        path = name or type(module).__name__.lower()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if path in sides or module is last:
                raise _refused(f"{path} runs twice, so its units are not its own")
            outputs, inputs = module.weight.shape[:2]
            convolution = isinstance(module, _CONVOLUTIONS)
            if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
                if not module.groups == outputs == module.in_channels:
                    raise _refused(f"{path} has {module.groups} groups, which tie its units")
                # One filter a channel: the units pass through it.
                sides[path] = at, None
            else:
                each = 1 if at is None else inputs // at.units
                if at is not None and each > 1 and not isinstance(last, _CONVOLUTIONS):
                    raise _refused(f"{path} reads {inputs} values of {at.units} units")
                if at is not None and (inputs % at.units or not (flat or convolution)):
                    raise _refused(f"{path} reads {inputs} values of {at.units} units")
                after = Side(path, outputs)
                sides[path] = after, at and Side(at.hidden, at.units, each)
                at = after
            last, flat = module, not convolution
        elif isinstance(module, nn.Flatten) and module.start_dim == 1:
            flat = True
        elif not isinstance(module, _APART):
            raise _refused(f"{name} ({type(module).__name__}) may mix the units before it")
    # What the last matrix feeds is the output.
    return {
        path: (None if at is not None and rows is at else rows, columns)
        for path, (rows, columns) in sides.items()
    }


def _refused(what: str) -> GossamerError:
    return GossamerError(
        f"{what}, so none can be removed alone; search over weights (space=weight)"
    )


def _leaves(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested chains, in the order they run."""
    if isinstance(model, nn.Sequential):
        for key, module in model._modules.items():
            assert module is not None
            yield from _leaves(module, f"{name}.{key}" if name else key)
    elif next(model.children(), None) is None:
        yield name, model
    else:
        raise _refused(
            f"{type(model).__name__} is neither a transformer with MLP blocks nor a chain "
            "(nn.Sequential): its hidden units cannot be told"
        )
