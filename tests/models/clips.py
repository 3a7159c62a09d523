"""Labelled images for the tiny vision transformer, and a network over frames with its clips."""

import torch
from torch import Tensor, nn

from gossamer.methods.activations.streams.play import play
from gossamer.methods.activations.streams.video import moving_shapes
from gossamer.models import Inputs

__all__ = ["labelled_images", "pixels", "shapes", "stream_net", "streamed", "wrong_labels"]


def pixels(seed: int, count: int = 6) -> Tensor:
    """(count, 3, 16, 16) noise."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def labelled_images() -> Inputs:
    """Six images with labels 0 to 3."""
    return Inputs({"pixel_values": pixels(5), "labels": torch.arange(6) % 4})


def wrong_labels() -> Inputs:
    """A label that the model has no class for."""
    return Inputs({"pixel_values": pixels(5), "labels": torch.full((6,), 99)})


def stream_net() -> nn.Module:
    """A small convolutional network over single frames (N, 1, 12, 12)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 36, 3),
        ).eval()


def shapes() -> Inputs:
    """Six clips of five frames."""
    return moving_shapes(6, frames=5, size=12, seed=1)


def streamed(model: nn.Module) -> Tensor:
    """Outputs of two clips, frame by frame."""
    return play(model, moving_shapes(2, frames=4, size=12, seed=2).values["frames"])
