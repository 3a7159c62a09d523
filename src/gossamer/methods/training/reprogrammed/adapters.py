"""Adapters: what is learned while the network is frozen.

Shapes: B samples, C channels, H and W sides of the canvas, L soft tokens, D width, F features,
S source classes, T target classes.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from gossamer.core import GossamerError

__all__ = ["Adapter", "ImagePrompt", "LinearProbe", "SoftPrompt", "resized"]


class Adapter(nn.Module, ABC):
    """Changes what goes into a frozen network, and what comes out of it."""

    kind: str
    """Name under which it is stored."""

    def enter(self, name: str, value: Tensor) -> Tensor:
        """The network's input in place of the task's."""
        return value

    @abstractmethod
    def leave(self, features: Tensor, logits: Tensor) -> Tensor:
        """Target logits (B, T) from the head's input (B, F) and its output (B, S)."""

    @property
    def learned(self) -> int:
        """Number of learned values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def options(self) -> dict[str, Any]:
        """Plain values that build it again."""
        return {}


class LinearProbe(Adapter):
    """A linear head on the frozen features.

    Parameters
    ----------
    canvas : side to which images are resized first; None leaves inputs alone.
    """

    kind = "probe"

    def __init__(self, features: int, classes: int, canvas: int | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)
        self.canvas = canvas

    def enter(self, name: str, value: Tensor) -> Tensor:
        return value if self.canvas is None else resized(value, self.canvas)

    def leave(self, features: Tensor, logits: Tensor) -> Tensor:
        return self.linear(features.to(self.linear.weight.dtype))

    def options(self) -> dict[str, Any]:
        features, classes = self.linear.in_features, self.linear.out_features
        return {"features": features, "classes": classes, "canvas": self.canvas}


class _Mapped(Adapter):
    """A prompt, with one source class for each target class."""

    labels: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("labels", torch.arange(classes))

    def leave(self, features: Tensor, logits: Tensor) -> Tensor:
        return logits[:, self.labels].float()


class ImagePrompt(_Mapped):
    """A visual prompt: the image in the centre of the canvas, a learned frame around it.

    The frame is low + (high - low) * sigmoid(P), so that it stays within the range of pixels.

    Parameters
    ----------
    canvas : side of the network's images. width : of the frame.
    low, high : (C,) range of the pixels of every channel.
    """

    kind = "image prompt"
    low: Tensor
    high: Tensor

    def __init__(self, classes: int, canvas: int, width: int, low: Tensor, high: Tensor) -> None:
        super().__init__(classes)
        if 2 * width >= canvas:
            raise GossamerError(
                f"a frame {width} wide leaves no room for the image on a canvas of {canvas}; "
                f"give a width of at most {(canvas - 1) // 2}"
            )
        self.canvas, self.width = canvas, width
        self.frame = nn.Parameter(torch.zeros(len(low), canvas, canvas))
        self.register_buffer("low", low.view(-1, 1, 1).float())
        self.register_buffer("high", high.view(-1, 1, 1).float())

    @property
    def inside(self) -> Tensor:
        """(H, W) bool, where the image is."""
        size = self.canvas - 2 * self.width
        inner = torch.ones(size, size, dtype=torch.bool, device=self.frame.device)
        return pad(inner, [self.width] * 4, value=False)

    @property
    def learned(self) -> int:
        """Values of the frame, without those behind the image."""
        return len(self.frame) * int((~self.inside).sum())

    def enter(self, name: str, value: Tensor) -> Tensor:
        image = pad(resized(value, self.canvas - 2 * self.width), [self.width] * 4)
        frame = self.low + (self.high - self.low) * self.frame.sigmoid()
        return image + (frame * ~self.inside).to(image.dtype)

    def options(self) -> dict[str, Any]:
        return {
            "classes": len(self.labels),
            "canvas": self.canvas,
            "width": self.width,
            "low": self.low.flatten().tolist(),
            "high": self.high.flatten().tolist(),
        }


class SoftPrompt(_Mapped):
    """Learned vectors before the embeddings of a text; its classes are words of the vocabulary.

    Parameters
    ----------
    start : (L, D) values to begin with: embeddings of words.
    """

    kind = "soft prompt"

    def __init__(self, classes: int, start: Tensor) -> None:
        super().__init__(classes)
        self.vectors = nn.Parameter(start.detach().clone().float())

    def enter(self, name: str, value: Tensor) -> Tensor:
        """Embeddings (B, L + T, D) from (B, T, D)."""
        front = self.vectors.to(value.dtype).expand(len(value), -1, -1)
        return torch.cat([front, value], 1)

    def options(self) -> dict[str, Any]:
        return {"classes": len(self.labels)}


def resized(images: Tensor, side: int) -> Tensor:
    """(B, C, h, w) images as squares, bilinear; a smaller one is averaged, not sampled."""
    if images.dim() != 4:
        raise GossamerError(
            f"images are (samples, channels, height, width); got {tuple(images.shape)}"
        )
    if images.shape[-2:] == (side, side):
        return images
    return interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)
