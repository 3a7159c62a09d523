"""Play clips through a network frame by frame, with a fresh start for every clip.

Shapes: N clips, T frames.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.activations.streams.delta import DeltaLayer

__all__ = ["deltas_of", "fresh", "play"]


def deltas_of(model: nn.Module) -> tuple[DeltaLayer, ...]:
    """The delta layers at work in a network, in the order of its modules."""
    forwards = (vars(module).get("forward") for module in model.modules())
    found = (getattr(forward, "__self__", None) for forward in forwards)
    return tuple(owner for owner in found if isinstance(owner, DeltaLayer))


@contextmanager
def fresh(model: nn.Module) -> Iterator[None]:
    """A new stream while open; the stream before is forgotten."""
    deltas = deltas_of(model)
    try:
        for delta in deltas:
            delta.reset()
        yield
    finally:
        for delta in deltas:
            delta.reset()


@torch.no_grad()
def play(model: nn.Module, clips: Tensor) -> Tensor:
    """Outputs of a network for every frame, (N, T, ...).

    Parameters
    ----------
    model : maps frames (N, ...) to outputs (N, ...); with or without deltas.
    clips : (N, T, ...).
    """
    if clips.dim() < 3:
        raise GossamerError(f"clips have shape {tuple(clips.shape)}; give (clips, frames, ...)")
    device = next(model.parameters()).device
    with fresh(model):
        return torch.stack([model(frame) for frame in clips.to(device).unbind(1)], 1)
