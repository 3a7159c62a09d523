"""Gates: keep channel j of an activation iff its score |v_j| c_j exceeds a threshold.

One gate sits at the input of one linear layer (or of a layer's stack of experts), or at the
activated gate of an MLP. Scores with a channel weight need no second form: |v_j| c_j > t is
|v_j| > t / c_j, so every gate holds a ``cut`` on |v|, one number or one per channel, and masked
and kernel execution read the same. Shapes: I = channels, O = outputs, R = rank.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, QuantileSketch, Site, kept_count, topk_mask
from gossamer.methods.activations.experts import Mask, hook_down
from gossamer.methods.activations.positions import Positions

__all__ = [
    "INPUT_ROLES",
    "ChannelWeight",
    "Gate",
    "Gates",
    "LowRank",
    "Tap",
    "check_gate",
    "drop",
    "drop_all_but",
    "input_taps",
]

ChannelWeight = Callable[[Site, Tensor], Tensor | None]
See = Callable[[Tensor, int | None], None]
"""Called with real rows (n, I) and the expert they belong to, None without experts."""

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


def drop_all_but(x: Tensor, keep: int, cut: Tensor, dense: Tensor | None = None) -> Tensor:
    """Which entries a per-token count removes: all but the ``keep`` largest |x| / cut of a row.

    Equal scores go to the lower channel. NaN counts as infinite, so faults upstream stay visible.

    Parameters
    ----------
    x : (..., I). cut : float32, (1,) or (I,), above 0. dense : as for :func:`drop`.
    """
    score = torch.nan_to_num(x.abs().float() / cut, nan=torch.inf, posinf=torch.inf)
    removed = ~topk_mask(score.reshape(-1, x.shape[-1]), keep).view(x.shape)
    return removed if dense is None else removed & ~dense


@dataclass(frozen=True, eq=False)
class LowRank:
    """What serves the channels a gate removes: left (O, R) times right (R, I)."""

    left: Tensor
    right: Tensor

    @property
    def size(self) -> int:
        """Weights read for every token."""
        return self.left.numel() + self.right.numel()

    def to(self, device: torch.device) -> "LowRank":
        """The same on a device."""
        return LowRank(self.left.to(device), self.right.to(device))

    def __call__(self, removed: Tensor) -> Tensor:
        """(..., I) removed entries to what they give, (..., O)."""
        return removed @ self.right.T.to(removed) @ self.left.T.to(removed)


@dataclass(frozen=True, eq=False)
class Gate:
    """What is removed at one place.

    Parameters
    ----------
    name : of the site; for stacked experts, the layer's module and parameter; for the activated
        gate of an MLP (roles ``mlp.neurons``, ``experts.neurons``) the MLP's module and
        ``neurons``.
    role, block, module : as of the site; of neurons, the module is the activation function, or
        the stack of experts.
    size : weights read per token through this input when nothing is removed.
    sparsity : share of channels the cut was chosen to remove.
    cut : float32, (1,) or (I,); a channel stays iff not |v| <= cut. With ``keep``, cuts are
        relative: the token's own factor makes exactly ``keep`` channels exceed theirs.
    keep : channels every token keeps, or None for a fixed cut.
    low_rank : serves the removed channels, or None when they count as zero.
    """

    name: str
    role: str
    block: int
    module: str
    size: int
    sparsity: float
    cut: Tensor
    keep: int | None = None
    low_rank: LowRank | None = None

    @property
    def fixed(self) -> bool:
        """A fixed cut and no repair: all that a kernel needs to know is ``cut``."""
        return self.keep is None and self.low_rank is None

    def removes(self, x: Tensor, dense: Tensor | None = None) -> Tensor:
        """Which entries of x (..., I) go; ``dense`` as for :func:`drop`."""
        if self.keep is None:
            return drop(x, self.cut, dense)
        return drop_all_but(x, self.keep, self.cut, dense)

    @property
    def saved(self) -> float:
        """Weights a token need not read when ``sparsity`` of the channels go, repair paid."""
        return self.sparsity * self.size - (self.low_rank.size if self.low_rank else 0)


@dataclass(frozen=True, eq=False)
class Tap:
    """A place where a gate can sit, before its threshold is known.

    Parameters
    ----------
    sites : the matrices that read this input: one, or all experts of a layer. Of neurons, the
        down projections.
    features : I.
    weight : c_j, float32 (I,), or None for 1.
    ups : of neurons, the matrices whose rows make what the activated gate is multiplied with;
        second halves of fused ones.
    """

    name: str
    role: str
    block: int
    module: str
    size: int
    features: int
    sites: tuple[Site, ...]
    weight: Tensor | None = None
    ups: tuple[Site, ...] = ()

    def weighed(self, model: nn.Module, channel_weight: ChannelWeight) -> "Tap":
        """This tap with c_j; experts that share an input take the root mean square of theirs."""
        weights = [channel_weight(site, site.weight(model)) for site in self.sites]
        if any(weight is None for weight in weights):
            return self
        squares = torch.stack([w.float().square() for w in weights if w is not None])
        return replace(self, weight=squares.mean(0).sqrt())

    def gate(self, sparsity: float, sketch: QuantileSketch) -> Gate:
        """The gate whose threshold is the ``sparsity``-quantile of the score |v_j| c_j."""
        return self.gate_at(sketch.quantile(sparsity), sparsity)

    def gate_at(self, threshold: float, sparsity: float) -> Gate:
        """The gate with a threshold of the score; ``sparsity`` is what it is known to remove."""
        return self._gate(sparsity, self._cut(torch.tensor([threshold], dtype=torch.float32)))

    def gate_keeping(self, sparsity: float) -> Gate:
        """The gate that keeps the same number of channels for every token."""
        cut = self._cut(torch.ones(1))
        return self._gate(sparsity, cut, kept_count(self.features, sparsity))

    def _cut(self, threshold: Tensor) -> Tensor:
        if self.weight is not None:
            # A channel of weight 0 feeds only zeros: any finite |v| is removed.
            threshold = threshold.to(self.weight.device)
            threshold = torch.where(self.weight > 0, threshold / self.weight, _LARGEST)
        return threshold.clamp_max(_LARGEST)

    def _gate(self, sparsity: float, cut: Tensor, keep: int | None = None) -> Gate:
        return Gate(self.name, self.role, self.block, self.module, self.size, sparsity, cut, keep)


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

    def observe(self, tap: Tap, see: See, *, ups: bool = False) -> None:
        """Show the real rows that pass a tap, and whose expert's they are, changing nothing.

        Parameters
        ----------
        ups : show what the activated gate is multiplied with instead.
        """
        handle: Any = None

        def look(x: Tensor, dense: Tensor | None, counted: Tensor) -> Tensor:
            see(x[counted].reshape(-1, x.shape[-1]), getattr(handle, "expert", None))
            return x

        self._counting = True
        handle = self._attach_ups(tap, look) if ups else self._attach(tap, look)
        self._handles[tap.name] = handle

    def _mask(self, gate: Gate) -> Mask:
        gate = replace(gate, cut=gate.cut.to(self._device(gate.module)))

        def mask(x: Tensor, dense: Tensor | None, counted: Tensor | None) -> Tensor:
            removed = gate.removes(x, dense)
            if counted is not None:
                rows = removed[counted]
                self.counts[gate.name] += torch.tensor([int(rows.sum()), rows.numel()])
            return x.masked_fill(removed, 0)

        return mask

    def _attach(self, place: Gate | Tap, change: Mask) -> Any:
        module = self.model.get_submodule(place.module)
        kind = place.role.partition(".")
        if kind[0] == "experts" and kind[2] != "gate_up":
            where = "neurons" if kind[2] == "neurons" else "down"
            return hook_down(module, change, self.positions, lambda: self._counting, where)
        if kind[2] == "neurons":
            return module.register_forward_hook(self._behind(change))
        if isinstance(place, Gate) and place.low_rank is not None:
            low_rank = place.low_rank.to(self._device(place.module))
            return _Repaired(module, low_rank, lambda x: self._pass(x, change))

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return self._pass(args[0], change), *args[1:]

        return module.register_forward_pre_hook(enter)

    def _behind(self, change: Mask) -> Any:
        def leave(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return self._pass(out, change)

        return leave

    def _attach_ups(self, tap: Tap, change: Mask) -> Any:
        module = self.model.get_submodule(tap.ups[0].module)
        if tap.ups[0].expert is not None:
            return hook_down(module, change, self.positions, lambda: self._counting, "up")
        fused = tap.ups[0].shape[0] > tap.features

        def leave(module: nn.Module, args: Any, out: Tensor) -> None:
            self._pass(out.chunk(2, dim=-1)[1] if fused else out, change)

        return module.register_forward_hook(leave)

    def _device(self, module: str) -> torch.device:
        # An activation function has no parameters of its own.
        for owner in (self.model.get_submodule(module), self.model):
            if (parameter := next(owner.parameters(), None)) is not None:
                return parameter.device
        return torch.device("cpu")

    def _pass(self, x: Tensor, change: Mask) -> Tensor:
        counted = self.positions.counted(x) if self._counting else None
        return change(x, self.positions.dense(x), counted)

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


class _Repaired:
    """Hooks of a linear layer whose removed channels go through a low-rank path."""

    def __init__(
        self, module: nn.Module, low_rank: LowRank, mask: Callable[[Tensor], Tensor]
    ) -> None:
        removed: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            masked = mask(args[0])
            removed[:] = [args[0] - masked]
            return masked, *args[1:]

        def leave(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return out + low_rank(removed.pop())

        self.handles = [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        ]

    def remove(self) -> None:
        """Take both hooks away."""
        for handle in self.handles:
            handle.remove()


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
