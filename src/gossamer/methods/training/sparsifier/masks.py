"""Masks of parameters while they train: applied to weights, gradients and optimizer state.

A mask is a bool tensor of its parameter's shape, however that is stored; layers see their part.
Of a parameter sharded over processes, a mask has the shape of the part that is here.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gossamer.core import GossamerError, pack_bits, unknown, unpack_bits
from gossamer.methods.training.sparsifier.layers import Layer
from gossamer.methods.training.sparsifier.layout import Layout, here, sum_over_processes, world

__all__ = [
    "Held",
    "check_optimizer",
    "hold",
    "kept_counts",
    "left_over",
    "masked",
    "plain_optimizer",
    "same_everywhere",
    "whole_masks",
]

_MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


class Held:
    """One parameter with its mask.

    Parameters
    ----------
    weight : the model's parameter.
    master : what the optimizer updates: the parameter itself, or its copy in higher precision.

    Attributes
    ----------
    layout : where its entries are. mask : True where kept, of the entries that are here.
    """

    def __init__(self, path: str, weight: nn.Parameter, master: Tensor) -> None:
        self.path = path
        self.weight = weight
        self.master = master
        self.layout = Layout(path, weight)
        self.mask = torch.ones_like(here(weight), dtype=torch.bool)

    @property
    def shown(self) -> Tensor:
        """The weight's entries that are here."""
        return here(self.weight.detach())

    @property
    def trained(self) -> Tensor:
        """The master's entries that are here."""
        return here(self.master.detach())

    @property
    def gradient(self) -> Tensor | None:
        """The gradient's entries that are here."""
        return None if self.master.grad is None else here(self.master.grad)

    @property
    def values(self) -> tuple[Tensor, ...]:
        """Weight and master, of what is here; one of them where they are the same."""
        own = self.master is self.weight
        return (self.shown,) if own else (self.shown, self.trained)

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The mask as numbers; products with it run several times faster than fills."""
        return self.mask.view(torch.uint8).to(dtype)

    def mask_gradient(self, parameter: Tensor) -> None:
        """Set a sharded parameter's gradient to zero where weights are removed."""
        gradient = here(parameter.grad)
        if str(self.layout.working) != gradient.device.type:
            # Offloaded: the copy to where the mask is may still be under way.
            torch.accelerator.current_stream().synchronize()
        gradient.mul_(self.wide(gradient.dtype))

    def tensors(self, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        """The weight, its master, and all optimizer state of its shape: what is here of them."""
        yield from self.values
        state = cast(Mapping[Any, Mapping[str, Any]], optimizer.state)
        for value in state.get(self.master, {}).values():
            if isinstance(value, Tensor) and value.shape == self.weight.shape:
                yield here(value)

    @torch.no_grad()
    def enforce(self, optimizer: torch.optim.Optimizer) -> None:
        """Set removed weights and their optimizer state to zero.

        The mask is stored at a byte an entry and widened here for as long as it is needed.
        """
        wide: dict[torch.dtype, Tensor] = {}
        for tensor in self.tensors(optimizer):
            if tensor.dtype not in wide:
                wide[tensor.dtype] = self.wide(tensor.dtype)
            tensor.mul_(wide[tensor.dtype])

    @torch.no_grad()
    def clear(self, optimizer: torch.optim.Optimizer, where: Tensor) -> None:
        """Set weights and their optimizer state to zero at some places."""
        for tensor in self.tensors(optimizer):
            tensor.masked_fill_(where, 0)


def hold(
    model: nn.Module, layers: tuple[Layer, ...], masters: Mapping[str, Tensor]
) -> dict[str, Held]:
    """The parameters of the layers, all of them kept.

    Raises
    ------
    GossamerError
        If one does not train, or a master is none of its weight.
    """
    if not isinstance(masters, Mapping):
        raise GossamerError(f"masters is {masters!r}; give a dict of parameter name to tensor")
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, master in masters.items():
        if name not in known:
            raise unknown("parameter in masters", name, list(known))
        if not isinstance(master, Tensor):
            raise GossamerError(f"the master of {name} is {master!r}; give the tensor that trains")
    held: dict[str, Held] = {}
    for layer in layers:
        if layer.parameter in held:
            continue
        weight = model.get_parameter(layer.parameter)
        if not weight.requires_grad:
            raise GossamerError(f"{layer.parameter} does not train; skip {layer.name}")
        master = masters.get(layer.parameter, weight)
        if master.shape != weight.shape:
            raise GossamerError(
                f"the master of {layer.parameter} has shape {tuple(master.shape)}, the weight "
                f"{tuple(weight.shape)}"
            )
        held[layer.parameter] = Held(layer.parameter, weight, master)
    return held


def masked(gradient: Tensor, mask: Tensor) -> Tensor:
    """A gradient with zeros where weights are removed."""
    return gradient * mask.view(torch.uint8).to(gradient.dtype)


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, without what wraps it (accelerate's).

    Raises
    ------
    GossamerError
        If it is none of torch's: only those tell when they step.
    """
    while not hasattr(optimizer, "register_step_pre_hook") or hasattr(optimizer, "optimizer"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise GossamerError(
                f"the optimizer is a {type(optimizer).__name__}; attach to a torch.optim.Optimizer"
            )
        optimizer = inner
    return optimizer


def check_optimizer(optimizer: torch.optim.Optimizer, held: Mapping[str, Held]) -> None:
    """Refuse an optimizer that does not train these weights, or holds another model's state.

    Raises
    ------
    GossamerError
        Naming the weight and the shapes.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    state = cast(Mapping[Any, Mapping[str, Any]], optimizer.state)
    for path, one in held.items():
        if id(one.master) not in known:
            raise GossamerError(
                f"the optimizer does not train {path}; make it from the model's parameters, pass "
                "masters={name: tensor} if it trains copies, or skip the layer"
            )
        for name, value in state.get(one.master, {}).items():
            if name in _MOMENTS and isinstance(value, Tensor) and value.shape != one.weight.shape:
                raise GossamerError(
                    f"the optimizer's {name} of {path} has shape {tuple(value.shape)}, the weight "
                    f"{tuple(one.weight.shape)}; load the state saved with this model"
                )


def left_over(held: Mapping[str, Held], trained: Callable[[Held], Tensor]) -> float:
    """Mean size of removed values over that of kept ones. Collective where they are sharded."""
    found = [0.0, 0.0, 0.0, 0.0]
    sharded = any(one.layout.sharded for one in held.values())
    for one in held.values():
        size = trained(one).abs().double()
        for at, part in ((0, ~one.mask), (2, one.mask)):
            if one.layout.mine or not sharded:
                found[at] += float((size * part).sum())
                found[at + 1] += int(part.count_nonzero())
    if sharded:
        found = sum_over_processes(found, next(iter(held.values())).layout.working)
    gone, removed, stays, kept = found
    return (gone / removed) / (stays / kept) if removed and stays else 0.0


def kept_counts(layers: tuple[Layer, ...], held: Mapping[str, Held]) -> dict[str, int]:
    """Number of kept weights of every layer. Collective where they are sharded."""
    sharded = any(one.layout.sharded for one in held.values())
    if sharded and all(layer.expert is None for layer in layers):
        ones = [held[layer.parameter] for layer in layers]
        found = [int(one.mask.count_nonzero()) * one.layout.mine for one in ones]
        counts = sum_over_processes(found, ones[0].layout.working)
        return dict(zip((layer.name for layer in layers), counts, strict=True))
    return {name: int(mask.count_nonzero()) for name, mask in whole_masks(layers, held)}


def whole_masks(
    layers: tuple[Layer, ...], held: Mapping[str, Held]
) -> Iterator[tuple[str, Tensor]]:
    """Layers with their masks (O, I), one parameter after the other. Collective as above."""
    for path, one in held.items():
        full = one.layout.full(one.mask)
        for layer in layers:
            if layer.parameter == path:
                yield layer.name, layer.view(full)


def same_everywhere(
    masks: Mapping[str, Tensor], held: Mapping[str, Held] | None = None
) -> dict[str, Tensor]:
    """The masks of rank 0 on every rank, of parameters that are not sharded.

    Decisions come from reduced gradients and equal weights, so they agree as it is; this makes it
    certain where a kernel's order of summation differs between devices. Masks of shards were
    agreed on as a whole before they were split.
    """
    if world() == 1:
        return dict(masks)
    whole = [p for p in masks if held is None or not held[p].layout.sharded]
    if not whole:
        return dict(masks)
    packed = [pack_bits(masks[path]) for path in whole]
    # All of them at once: a message costs more than what it carries.
    bits = torch.cat(packed)
    dist.broadcast(bits, src=0)
    parts = bits.split([len(part) for part in packed])
    agreed = {
        p: unpack_bits(part, tuple(masks[p].shape)) for p, part in zip(whole, parts, strict=True)
    }
    return {**masks, **agreed}
