"""Attention that skips tiles far below the largest score: the rule, its scale, its file."""

from gossamer.methods.attention.tile_skip.calibration import Scale, TileCounter, fit_scale
from gossamer.methods.attention.tile_skip.config import (
    read_scales,
    scales_of,
    sparse_attention_config,
    write_scales,
)
from gossamer.methods.attention.tile_skip.threshold import ThresholdIndex

__all__ = [
    "Scale",
    "ThresholdIndex",
    "TileCounter",
    "fit_scale",
    "read_scales",
    "scales_of",
    "sparse_attention_config",
    "write_scales",
]
