"""Importance scores: pure functions of tensors. Higher means keep."""

from gossamer.core.scores.activation import (
    channel_magnitude,
    outlier_share,
    weight_times_input,
    weighted_channel,
)
from gossamer.core.scores.attention import attention_mass, positional_window
from gossamer.core.scores.curvature import obs_saliency
from gossamer.core.scores.gradient import fisher, taylor
from gossamer.core.scores.magnitude import lamp, magnitude
from gossamer.core.scores.random import uniform_random

__all__ = [
    "attention_mass",
    "channel_magnitude",
    "fisher",
    "lamp",
    "magnitude",
    "obs_saliency",
    "outlier_share",
    "positional_window",
    "taylor",
    "uniform_random",
    "weight_times_input",
    "weighted_channel",
]
