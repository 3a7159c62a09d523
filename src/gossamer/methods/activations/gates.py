"""Gates: keep channel j of an activation iff its score |v_j| c_j exceeds a threshold.

One gate sits at the input of one linear layer (or of a layer's stack of experts). Scores with a
channel weight need no second form: |v_j| c_j > t is |v_j| > t / c_j, so every gate holds a
``cut`` on |v|, one number or one per channel, and masked and kernel execution read the same.
Shapes: I = channels.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, QuantileSketch, Site
from gossamer.methods.activations.experts import Mask, hook_down
from gossamer.methods.activations.positions import Positions

__all__ = [
    "INPUT_ROLES",
    "ChannelWeight",
    "Gate",
    "Gates",
    "Tap",
    "check_gate",
    "drop",
    "input_taps",
]

ChannelWeight = Callable[[Site, Tensor], Tensor | None]

INPUT_ROLES: tuple[str, ...] = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.qkv",
    "attention.o",
    "mlp.gate",
    "mlp.up",
    "mlp.gate_up",
    "mlp.down",
    "experts.gate_up",
    "experts.down",
)
"""Every linear layer of a block but the router, which is small and decides what is read."""

_LARGEST = torch.finfo(torch.float32).max


def drop(x: Tensor, cut: Tensor, dense: Tensor | None = None) -> Tensor:
    """Which entries of x a gate removes: |x| <= cut outside the dense rows.

    NaN and infinity compare as not below any finite cut, so faults upstream stay visible.

    Parameters
    ----------
    x : (..., I). cut : float32, (1,) or (I,). dense : bool that broadcasts to x, or None.
    """
    removed = x.abs() <= cut
    return removed if dense is None else removed & ~dense


@dataclass(frozen=True, eq=False)
class Gate:
    """What is removed at one place.

    Parameters
    ----------
    name : of the site; for stacked experts, the layer's module and parameter.
    role, block, module : as of the site.
    size : weights read per token through this input when nothing is removed.
    sparsity : share of channels the cut was chosen to remove.
    cut : float32, (1,) or (I,); a channel stays iff not |v| <= cut.
    """

    name: str
    role: str
    block: int
    module: str
    size: int
    sparsity: float
    cut: Tensor


@dataclass(frozen=True, eq=False)
class Tap:
    """A place where a gate can sit, before its threshold is known.

    Parameters
    ----------
    sites : the matrices that read this input: one, or all experts of a layer.
    features : I.
    weight : c_j, float32 (I,), or None for 1.
    """

    name: str
    role: str
    block: int
    module: str
    size: int
    features: int
    sites: tuple[Site, ...]
    weight: Tensor | None = None

    def weighed(self, model: nn.Module, channel_weight: ChannelWeight) -> "Tap":
        """This tap with c_j; experts that share an input take the root mean square of theirs."""
        weights = [channel_weight(site, site.weight(model)) for site in self.sites]
        if any(weight is None for weight in weights):
            return self
        squares = torch.stack([w.float().square() for w in weights if w is not None])
        return replace(self, weight=squares.mean(0).sqrt())

    def gate(self, sparsity: float, sketch: QuantileSketch) -> Gate:
        """The gate whose threshold is the ``sparsity``-quantile of the score |v_j| c_j."""
        threshold = torch.tensor([sketch.quantile(sparsity)], dtype=torch.float32)
        if self.weight is not None:
            # A channel of weight 0 feeds only zeros: any finite |v| is removed.
            threshold = torch.where(self.weight > 0, threshold / self.weight, _LARGEST)
        return Gate(
            self.name,
            self.role,
            self.block,
            self.module,
            self.size,
            sparsity,
            threshold.clamp_max(_LARGEST),
        )


def input_taps(sites: Iterable[Site], roles: Iterable[str], active: float = 1.0) -> tuple[Tap, ...]:
    """A tap at the input of every site with one of the roles, in the order of the sites.

    Parameters
    ----------
    active : share of a layer's experts that run for a token; scales the weights they read.
    """
    wanted, groups = frozenset(roles), dict[str, list[Site]]()
    for site in sites:
        if site.role in wanted:
            name = site.name if site.expert is None else f"{site.module}.{site.parameter}"
            groups.setdefault(name, []).append(site)
    return tuple(
        Tap(
            name=name,
            role=group[0].role,
            block=group[0].block,
            module=group[0].module,
            size=round(sum(s.size for s in group) * (1.0 if group[0].expert is None else active)),
            features=group[0].shape[1],
            sites=tuple(group),
        )
        for name, group in groups.items()
    )


class Gates:
    """Gates at work on a model as hooks: masked-dense execution, undone by :meth:`remove`.

    Gates of sparsity 0 get no hook, so a method at sparsity 0 is the dense model bit for bit.
    """

    def __init__(self, model: nn.Module, positions: Positions) -> None:
        self.model = model
        self.positions = positions
        self.gates: dict[str, Gate] = {}
        self.counts: dict[str, Tensor] = {}
        self._counting = False
        self._handles: dict[str, Any] = {}

    def set(self, gates: Iterable[Gate]) -> None:
        """Put gates to work, replacing earlier ones of the same name."""
        for gate in gates:
            if gate.name in self._handles:
                self._handles.pop(gate.name).remove()
            self.gates[gate.name] = gate
            if gate.sparsity > 0:
                self._handles[gate.name] = self._attach(gate, self._mask(gate))

    def observe(self, tap: Tap, see: Callable[[Tensor], None]) -> None:
        """Show the real rows that pass a tap to ``see``, changing nothing."""

        def look(x: Tensor, dense: Tensor | None, counted: Tensor) -> Tensor:
            see(x[counted].reshape(-1, x.shape[-1]))
            return x

        self._counting = True
        self._handles[tap.name] = self._attach(tap, look)

    def _mask(self, gate: Gate) -> Mask:
        cut = gate.cut.to(next(self.model.get_submodule(gate.module).parameters()).device)

        def mask(x: Tensor, dense: Tensor | None, counted: Tensor | None) -> Tensor:
            removed = drop(x, cut, dense)
            if counted is not None:
                rows = removed[counted]
                self.counts[gate.name] += torch.tensor([int(rows.sum()), rows.numel()])
            return x.masked_fill(removed, 0)

        return mask

    def _attach(self, place: Gate | Tap, change: Mask) -> Any:
        module = self.model.get_submodule(place.module)
        if place.role == "experts.down":
            return hook_down(module, change, self.positions, lambda: self._counting)

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            counted = self.positions.counted(x) if self._counting else None
            return change(x, self.positions.dense(x), counted), *args[1:]

        return module.register_forward_pre_hook(enter)

    @contextmanager
    def counting(self) -> Iterator[dict[str, Tensor]]:
        """Count (removed, seen) entries of every gate over the real tokens that are masked."""
        self.counts = {name: torch.zeros(2, dtype=torch.int64) for name in self.gates}
        self._counting = True
        try:
            yield self.counts
        finally:
            self._counting = False

    def remove(self) -> None:
        """Take every hook away. A second call does nothing."""
        while self._handles:
            self._handles.popitem()[1].remove()


def check_gate(gate: Gate, tap: Tap | None) -> None:
    """Refuse a stored gate that the model at hand has no place for."""
    if tap is None:
        raise GossamerError(
            f"the saved thresholds name {gate.name}, which this model does not have; "
            "use the model they were calibrated on"
        )
    if gate.size != tap.size or gate.cut.numel() not in (1, tap.features):
        raise GossamerError(
            f"the saved threshold of {gate.name} is for {gate.size:,} weights; this model reads "
            f"{tap.size:,} there: use the model it was calibrated on"
        )
