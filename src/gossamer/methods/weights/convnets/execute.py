"""Execution: pruned pointwise convolutions run on the sparse kernel, by rule or by measurement.

The modules keep their dense weights, so that the model trains, saves and loads as before; in
evaluation mode their ``forward`` is the kernel's, with normalisation and clamp in the same pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.kernels.measured import Choice, fastest
from gossamer.kernels.sparse_conv import SparseConv1x1
from gossamer.kernels.sparse_conv.op import instruction_set
from gossamer.methods.weights.convnets.sites import ConvSite, Followers, followers
from gossamer.models import Inputs

__all__ = ["LEAST_ZEROS", "Execute", "Execution", "input_shapes", "run_on_kernel"]

Execute = Literal["auto", "sparse", "dense"]

LEAST_ZEROS = 2 / 3
"""The planner's rule: the kernel is worth a try where more of the pointwise weights are zero."""


class _Together:
    """In evaluation mode, the kernel; while any of the modules trains, the convolution itself."""

    def __init__(self, conv: nn.Conv2d, after: Followers, layer: SparseConv1x1) -> None:
        self.conv, self.after, self.layer = conv, after, layer
        self.seen = self._stamp()

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        """Where the folded tensors lie and how often they were written to."""
        modules = [self.conv] if self.after.norm is None else [self.conv, self.after.norm]
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
        return tuple(
            (t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None
        )

    def active(self) -> bool:
        """Whether the kernel runs now; packs again what was trained, loaded or moved since."""
        if any(module.training for module in (self.conv, *self.after.modules)):
            return False
        weight = self.conv.weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            return False
        if (stamp := self._stamp()) != self.seen:
            self.layer = SparseConv1x1.from_conv(
                self.conv, self.after.norm, *self.after.bounds, self.layer.block
            )
            self.seen = stamp
        return True

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.active() else type(self.conv).forward(self.conv, x)


class _Done:
    """A follower whose work the kernel has done already."""

    def __init__(self, module: nn.Module, together: _Together) -> None:
        self.module, self.together = module, together

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.together.active() else type(self.module).forward(self.module, x)


@dataclass
class Execution:
    """Which sites run on the kernel; :meth:`stop` gives every module its own ``forward`` back.

    Parameters
    ----------
    choices : measured times by site, where any were taken.
    notes : what was decided, in sentences.
    """

    choices: dict[str, Choice] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _runs: dict[str, _Together] = field(default_factory=dict)
    _patched: list[nn.Module] = field(default_factory=list)

    @property
    def layers(self) -> dict[str, SparseConv1x1]:
        """The kernel's modules by site."""
        return {name: run.layer for name, run in self._runs.items()}

    def take(self, name: str, conv: nn.Conv2d, after: Followers, layer: SparseConv1x1) -> None:
        """Run one site on the kernel from now on."""
        together = _Together(conv, after, layer)
        self._runs[name] = together
        # Assigned past Module.__setattr__, which would register what it holds.
        vars(conv)["forward"] = together
        self._patched.append(conv)
        for module in after.modules:
            vars(module)["forward"] = _Done(module, together)
            self._patched.append(module)

    def stop(self) -> None:
        """Undo; a second call does nothing."""
        for module in self._patched:
            vars(module).pop("forward", None)
        self._patched.clear()
        self._runs.clear()


@torch.no_grad()
def input_shapes(
    model: nn.Module, sites: tuple[ConvSite, ...], data: Inputs
) -> dict[str, tuple[int, ...]]:
    """Shape of what every site reads when the model sees the first sample."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles, modes = [], [(m, m.training) for m in model.modules()]
    try:
        for site in sites:

            def note(_: nn.Module, inputs: tuple, name: str = site.name) -> None:
                shapes[name] = tuple(inputs[0].shape)

            handles.append(site.owner(model).register_forward_pre_hook(note))
        model.eval()
        device = next(model.parameters()).device
        batch = next(data.batches(1, device))
        model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return shapes


def _refuse(model: nn.Module, sites: tuple[ConvSite, ...]) -> None:
    for site in sites:
        weight = site.weight(model)
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise GossamerError(
                f"{site.name} holds {weight.dtype} on {weight.device}; sparse execution takes "
                'float32 on cpu: use execute="dense"'
            )
    instruction_set()  # CannotBuild says what is missing


def _usable(model: nn.Module, sites: tuple[ConvSite, ...]) -> str | None:
    try:
        _refuse(model, sites)
    except GossamerError as error:
        return str(error)
    return None


def _measure(
    conv: nn.Conv2d, after: Followers, layer: SparseConv1x1, shape: tuple[int, ...]
) -> Choice:
    """The kernel's one pass against torch's convolution, normalisation and clamp."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def dense() -> Tensor:
        y = x
        modules: tuple[Any, ...] = (conv, *after.modules)
        for module in modules:
            y = type(module).forward(module, y)
        return y

    packed, sides = layer.packed, "x".join(map(str, shape))
    key = (
        f"sparse_conv {packed.shape[0]}x{packed.shape[1]} on {sides}, stride {layer.stride}, "
        f"{packed.kept} kept, blocks of {packed.block}, followers {len(after.modules)}"
    )
    return fastest(key, {"dense": dense, "sparse": lambda: layer(x)}, device="cpu")


def run_on_kernel(
    model: nn.Module,
    sites: tuple[ConvSite, ...],
    *,
    execute: Execute = "auto",
    fuse: bool = True,
    data: Any = None,
    only: tuple[str, ...] | None = None,
    blocks: Mapping[str, int] | None = None,
) -> Execution:
    """Choose what runs on the kernel, and let it.

    Parameters
    ----------
    execute : ``sparse`` all sites, ``dense`` none; ``auto`` none unless more than two thirds of
        all pointwise weights are zero, and then, where data say what the sites read, each site
        whose kernel is measured faster than torch's convolution.
    fuse : fold normalisation and clamp into the kernel's pass.
    data : images, for the measurement; all sites pass without.
    only : sites that an earlier choice named; nothing is decided anew.
    blocks : block by site; the packing's own rule where left out.

    Raises
    ------
    GossamerError
        If execution is ``sparse`` and the kernel cannot run.
    """
    made = Execution()
    if execute == "dense" or only == ():
        return made
    reason = _usable(model, sites)
    if reason is not None:
        if execute == "sparse":
            _refuse(model, sites)
        made.notes.append(f"all dense: {reason}")
        return made
    zeros = sum(int((site.weight(model) == 0).sum()) for site in sites)
    share = zeros / sum(site.size for site in sites)
    if execute == "auto" and only is None and share <= LEAST_ZEROS:
        made.notes.append(
            f"all dense: {share:.1%} of the pointwise weights are zero, the kernel is taken above "
            f"{LEAST_ZEROS:.1%}"
        )
        return made
    timed = execute == "auto" and only is None and isinstance(data, Inputs)
    shapes = input_shapes(model, sites, data) if timed else {}
    after = followers(model, sites) if fuse else {}
    try:
        for site in sites:
            if only is not None and site.name not in only:
                continue
            conv: Any = site.owner(model)
            own = after.get(site.name, Followers())
            block = (blocks or {}).get(site.name)
            layer = SparseConv1x1.from_conv(conv, own.norm, *own.bounds, block)
            if site.name in shapes:
                choice = made.choices[site.name] = _measure(conv, own, layer, shapes[site.name])
                if choice.name == "dense":
                    continue
            made.take(site.name, conv, own, layer)
    except BaseException:
        made.stop()
        raise
    made.notes.append(
        f"{len(made.layers)} of {len(sites)} pointwise convolutions run on the sparse kernel, "
        f"{'by measurement' if timed else 'by rule'}"
    )
    return made
