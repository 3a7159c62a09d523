"""Does a mask found before training know more than how many weights each layer keeps?

A method whose networks train as well after its masks are shuffled within layers, or after the
weights it looked at are drawn anew, has chosen layer shares and no weights.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from gossamer.core import pack_bits
from gossamer.methods.training.at_start.scored import AtStart
from gossamer.methods.training.base import Sparsifier, StartLoss

__all__ = ["CHECKS", "sanity_checks", "shuffled"]

CHECKS = ("found", "shuffled", "drawn anew", "inverted")


def shuffled(sparsifier: Sparsifier, seed: int) -> dict[str, Tensor]:
    """Masks of the same count in every layer at places drawn anew, packed, by parameter."""
    masks = {path: one.mask.clone() for path, one in sparsifier.held.items()}
    for layer in sparsifier.layers:
        own = layer.view(masks[layer.parameter])
        generator = torch.Generator().manual_seed(crc32(f"{seed}:{layer.name}".encode()))
        order = torch.randperm(layer.size, generator=generator).to(own.device)
        # Written through the view, so that stored layouts and stacked experts are respected.
        own.copy_(own.reshape(-1)[order].view(own.shape))
    return {path: pack_bits(mask) for path, mask in masks.items()}


def sanity_checks(
    method: AtStart,
    build: Callable[[int], nn.Module],
    run: Callable[[nn.Module, Callable[[nn.Module, Any], Sparsifier]], float],
    *,
    loss: StartLoss | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train under a method's masks as found, shuffled, with new weights, and inverted.

    Parameters
    ----------
    method : with unstructured masks.
    build : seed to an untrained network. run : trains a network under what the function it is
        given attaches to it and an optimizer, and returns a figure, such as the accuracy.
    loss : what ``method.attach`` takes.

    Returns
    -------
    The figure for each of :data:`CHECKS`.

    Source: arXiv 2009.08576 (Frankle et al.), §4.
    """
    model = build(seed)
    looked = method.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), loss=loss)
    state = looked.state_dict()
    looked.remove()
    moved = {**state, "masks": shuffled(looked, seed)}

    def under(saved: dict[str, Any]) -> Callable[[nn.Module, Any], Sparsifier]:
        return lambda net, optimizer: method.attach(net, optimizer, state=saved)

    inverse = replace(method, invert=not method.invert)
    return {
        "found": run(build(seed), under(state)),
        "shuffled": run(build(seed), under(moved)),
        "drawn anew": run(build(seed + 1_000_003), under(state)),
        "inverted": run(
            build(seed), lambda net, optimizer: inverse.attach(net, optimizer, loss=loss)
        ),
    }
