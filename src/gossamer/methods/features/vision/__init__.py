"""Sparse coding of natural images: whitened patches, the coder, and what its atoms look like."""

from gossamer.methods.features.vision.coder import PENALTIES, SparseCoder
from gossamer.methods.features.vision.fields import gabor_fit, gabor_like, mosaic, orientation
from gossamer.methods.features.vision.patches import natural_patches, whiten

__all__ = [
    "PENALTIES",
    "SparseCoder",
    "gabor_fit",
    "gabor_like",
    "mosaic",
    "natural_patches",
    "orientation",
    "whiten",
]
