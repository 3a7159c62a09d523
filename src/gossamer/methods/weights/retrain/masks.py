"""Masks hold: after every optimizer step, removed weights and their optimizer state are zero.

Shapes: masks have the shape of their parameter, however the parameter is stored.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.weights.pruned import PrunedModel

__all__ = ["Masks", "apply_masks", "holding", "mask_gradients", "parameter_masks"]

Masks = Mapping[str, Tensor]
"""Path of a parameter to a bool mask of its shape, True where kept."""


def parameter_masks(work: PrunedModel) -> dict[str, Tensor]:
    """The masks of a pruned model by parameter, in the parameters' own layout.

    A matrix stored as (in, out) gets its mask transposed; of stacked experts those that were not
    pruned keep everything.
    """
    masks: dict[str, Tensor] = {}
    for name, site in work.sites.items():
        path = f"{site.module}.{site.parameter}"
        parameter = work.model.get_parameter(path)
        if path not in masks:
            masks[path] = torch.ones_like(parameter, dtype=torch.bool)
        kept = work.selection(name).mask().to(parameter.device)
        own = masks[path] if site.expert is None else masks[path][site.expert]
        own.copy_(kept.T if site.transposed else kept)
    return masks


def _pairs(model: nn.Module, masks: Masks) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters with their masks as numbers of their own dtype: 1 where kept, else 0."""
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    for name, mask in masks.items():
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            raise GossamerError(
                f"the masks name {name}, which this {type(model).__name__} does not have"
            ) from None
        if mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise GossamerError(
                f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}; "
                f"give bool of {tuple(parameter.shape)}"
            )
        pairs.append((parameter, mask.to(parameter)))
    return pairs


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set the removed weights of a model to zero."""
    for parameter, kept in _pairs(model, masks):
        # Not a product: that would leave -0.0 where a negative weight was, and NaN where NaN was.
        parameter.masked_fill_(kept == 0, 0)


def mask_gradients(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Set the gradients of removed weights to zero, so that they count in no norm."""
    for parameter, kept in pairs:
        if parameter.grad is not None:
            parameter.grad.mul_(kept)


@contextmanager
def holding(
    optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks
) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """While open, every step of the optimizer leaves removed weights and their state at zero.

    Works with any optimizer of torch, inside any training loop. Gradients are masked before a
    step; weights, and all state of a weight's shape (momentum, second moments), after it.

    Parameters
    ----------
    masks : parameter path to bool mask, True where kept; the weights are masked on entry.

    Yields
    ------
    pairs for :func:`mask_gradients`, for a loop that clips the norm of gradients.
    """
    pairs = _pairs(model, masks)
    apply_masks(model, masks)

    def before(*_: Any) -> None:
        mask_gradients(pairs)

    @torch.no_grad()
    def after(*_: Any) -> None:
        # Products, which run several times faster than fills; what they meet is 0 already unless
        # an optimizer moves a weight that has no gradient.
        for parameter, kept in pairs:
            parameter.mul_(kept)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.mul_(kept)

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()
