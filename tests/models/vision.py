"""A tiny MobileNetV2 and images for it: seeded, with normalisation that has seen data."""

from functools import cache

import torch
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from gossamer.models import Inputs

__all__ = ["images", "logits", "mobilenet"]

LABELS = 5


@cache
def images(seed: int = 0, count: int = 8) -> Inputs:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    return Inputs({"pixel_values": pixels, "labels": torch.arange(count) % LABELS})


@cache
def _state() -> dict[str, Tensor]:
    """Weights of a usual scale, and the statistics that random images have under them."""
    model = MobileNetV2ForImageClassification(_config())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        model.train()(images(1, 16).values["pixel_values"])
    return model.state_dict()


def _config() -> MobileNetV2Config:
    return MobileNetV2Config(
        image_size=32,
        depth_multiplier=0.05,
        depth_divisible_by=8,
        min_depth=8,
        expand_ratio=2.0,
        num_labels=LABELS,
        finegrained_output=False,
        classifier_dropout_prob=0.1,
    )


def mobilenet() -> nn.Module:
    """The model, always with the same weights, in eval mode."""
    model = MobileNetV2ForImageClassification(_config())
    model.load_state_dict(_state())
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    """Of four other images."""
    with torch.no_grad():
        return model(pixel_values=images(7, 4).values["pixel_values"]).logits
