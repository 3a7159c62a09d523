"""The hidden units of MLPs: find their activation functions, watch what leaves them.

Watched is the vector a that enters the down projection: the activation function's output, times
the up projection where the MLP is gated. An exact zero there is a row and columns of weights that
need not be read. Shapes: I = hidden units, T = real tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import UnsupportedModel, check_sparsity
from gossamer.methods.activations.calibration import active_experts
from gossamer.methods.activations.experts import hook_down
from gossamer.methods.activations.gates import Tap, input_taps
from gossamer.methods.activations.positions import Positions
from gossamer.methods.activations.training.fatrelu import FATReLU
from gossamer.models import Inputs, SiteMap, Tokens, find_sites
from gossamer.models.capture import evaluating

__all__ = [
    "Activity",
    "HiddenPenalty",
    "HiddenUnits",
    "activation_functions",
    "hidden_units",
    "measure_activity",
    "swapped",
    "watching",
]

_HOMES = ("torch.nn.modules.activation", "transformers.activations")


@dataclass(frozen=True)
class HiddenUnits:
    """The hidden units of one MLP, or of one layer's experts.

    Parameters
    ----------
    tap : where they enter the down projection.
    functions : paths of the activation functions that make them.
    readers : weights a token reads through them: down columns, and up rows of gated MLPs.
    """

    tap: Tap
    functions: tuple[str, ...]
    readers: int


@dataclass(frozen=True)
class Activity:
    """How much of a layer's hidden activation speaks.

    Parameters
    ----------
    nonzero : share of entries above the tolerance, averaged over tokens.
    live : share of units that were above it for at least one token; None when not measured.
    exact : share of entries that are not exactly zero; None when not measured.
    """

    nonzero: float
    live: float | None = None
    exact: float | None = None


def activation_functions(model: nn.Module, sites: SiteMap) -> dict[str, nn.Module]:
    """Activation functions of the MLPs by path, in the order of the blocks.

    Raises
    ------
    UnsupportedModel
        If a block computes its activation without a module of its own.
    """
    found: dict[str, nn.Module] = {}
    for index, block in enumerate(sites.blocks):
        attention = sites.attentions[index] + "."
        here = {
            path: module
            for name, module in model.get_submodule(block).named_modules()
            if (type(module).__module__ in _HOMES or isinstance(module, FATReLU))
            and not (path := f"{block}.{name}").startswith(attention)
        }
        if not here:
            raise UnsupportedModel(f"{block} holds no activation function as a module")
        found |= here
    return found


def hidden_units(model: nn.Module, sites: SiteMap | None = None) -> tuple[HiddenUnits, ...]:
    """Every place where hidden units enter a down projection, block by block."""
    sites = sites or find_sites(model)
    functions = activation_functions(model, sites)
    active = active_experts(model, sites)
    found: list[HiddenUnits] = []
    for index, block in enumerate(sites.blocks):
        inside = sites.in_block(index)
        paths = [path for path in functions if path.startswith(block + ".")]
        taps = input_taps(inside, ("mlp.down", "experts.down"), active)
        for tap in taps:
            near = max(_shared(path, tap.name) for path in paths)
            mine = tuple(path for path in paths if _shared(path, tap.name) == near)
            mates = {tap.sites[0].name, *tap.sites[0].coupled}
            roles = {site.role for site in inside if site.name in mates}
            gated = bool(roles & {"mlp.gate", "mlp.gate_up", "experts.gate_up"})
            found.append(HiddenUnits(tap, mine, tap.size * (2 if gated else 1)))
    return tuple(found)


def _shared(a: str, b: str) -> int:
    """Leading parts that two paths share."""
    parts = zip(a.split("."), b.split("."), strict=False)
    count = 0
    for one, other in parts:
        if one != other:
            break
        count += 1
    return count


@contextmanager
def swapped(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Put modules in the place of others while open."""
    before = {path: model.get_submodule(path) for path in modules}

    def put(chosen: dict[str, nn.Module]) -> None:
        for path, module in chosen.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)

    try:
        put(modules)
        yield
    finally:
        put(before)


@contextmanager
def watching(
    model: nn.Module, see: Callable[[Tap, Tensor], None], sites: SiteMap | None = None
) -> Iterator[None]:
    """Show the hidden units of every forward pass to ``see``, changing nothing.

    Parameters
    ----------
    see : called with the place and the rows (..., I) of real tokens; gradients flow. Stacked
        experts call it once for every expert that runs, with the rows routed to it.
    """
    sites = sites or find_sites(model)
    positions = Positions(dense_prefix=0)
    handles: list[Any] = positions.watch(model.get_submodule(sites.base))
    taps = [units.tap for units in hidden_units(model, sites)]

    def rows(x: Tensor) -> Tensor:
        # Without a mask every token is real, and no copy is needed.
        return x if positions.mask is None else x[positions.counted(x)]

    def dense(tap: Tap) -> Callable[..., None]:
        return lambda module, args: see(tap, rows(args[0]))

    def stacked(tap: Tap) -> Callable[..., Tensor]:
        def look(x: Tensor, dense: Any, counted: Any) -> Tensor:
            see(tap, x[counted])
            return x

        return look

    try:
        for tap in taps:
            module = model.get_submodule(tap.module)
            if tap.role == "experts.down":
                handles.append(hook_down(module, stacked(tap), positions, lambda: True))
            else:
                handles.append(module.register_forward_pre_hook(dense(tap)))
        yield
    finally:
        while handles:
            handles.pop().remove()


class HiddenPenalty:
    """A term over hidden activations that any training loop can add to its loss.

    Open it around the loop; call it after a forward pass, whose hidden units it holds until the
    next one::

        with HiddenPenalty(model, term) as penalty:
            loss = model(**batch).loss + weight * penalty()

    Parameters
    ----------
    term : rows (..., I) of one layer to one number a row (...), in fp32.
    """

    def __init__(self, model: nn.Module, term: Callable[[Tensor], Tensor]) -> None:
        self._model, self._term = model, term
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def _see(self, tap: Tap, rows: Tensor) -> None:
        # A product in half precision would lose small squares.
        value = self._term(rows.float() if rows.element_size() < 4 else rows)
        zero = value.new_zeros(())
        self._sums[tap.name] = self._sums.get(tap.name, zero) + value.sum()
        self._rows[tap.name] = self._rows.get(tap.name, 0) + value.numel()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._sums, self._rows = {}, {}

    def __call__(self) -> Tensor:
        """Mean over layers of the mean over real tokens of the last forward pass."""
        assert self._sums, "call the penalty after a forward pass inside its context"
        means = [self._sums[name] / max(1, self._rows[name]) for name in self._sums]
        return torch.stack(means).mean()

    def __enter__(self) -> "HiddenPenalty":
        sites = find_sites(self._model)
        with ExitStack() as stack:
            base = self._model.get_submodule(sites.base)
            stack.callback(base.register_forward_pre_hook(self._begin).remove)
            stack.enter_context(watching(self._model, self._see, sites))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._sums, self._rows = {}, {}
        self._open.close()


@torch.no_grad()
def measure_activity(
    model: nn.Module,
    data: Tokens | Inputs,
    *,
    tolerance: float = 0.0,
    batch_size: int = 8,
) -> dict[str, Activity]:
    """Share of non-zero hidden units of every layer over the real tokens of some data.

    Parameters
    ----------
    tolerance : entries of at most this size count as zero; 0 counts exact zeros, which only
        ReLU-like functions make.

    Returns
    -------
    By the name of the down projection. Units of stacked experts count as live when they are in
    any expert.
    """
    check_sparsity(tolerance, "tolerance")
    sites = find_sites(model)
    base = model.get_submodule(sites.base)
    names, device = signature(base.forward).parameters, next(base.parameters()).device
    seen: dict[str, list[Any]] = {}

    def count(tap: Tap, rows: Tensor) -> None:
        active = rows.reshape(-1, rows.shape[-1]).abs() > tolerance
        none = torch.zeros(1, dtype=torch.bool, device=device)
        mine = seen.setdefault(tap.name, [0, 0, none, 0])
        mine[0] += int(active.sum())
        mine[1] += active.numel()
        mine[2] = mine[2] | active.any(0)
        mine[3] += int(rows.count_nonzero())

    with evaluating(model), watching(model, count, sites):
        for batch in data.batches(batch_size, device):
            base(**{name: value for name, value in batch.items() if name in names})
    return {
        name: Activity(active / max(1, total), float(live.float().mean()), exact / max(1, total))
        for name, (active, total, live, exact) in seen.items()
    }
