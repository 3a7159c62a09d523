"""Measuring a model: quality, distance from dense, size and speed."""

from gossamer.evaluate.divergence import Reference, kl_divergence
from gossamer.evaluate.footprint import Footprint, bitmask_bytes, footprint
from gossamer.evaluate.generation import (
    GenerationAgreement,
    continuations,
    generation_agreement,
)
from gossamer.evaluate.perplexity import Score, score
from gossamer.evaluate.speed import Rate, Speed, speed
from gossamer.evaluate.windows import Windows, windows

__all__ = [
    "Footprint",
    "GenerationAgreement",
    "Rate",
    "Reference",
    "Score",
    "Speed",
    "Windows",
    "bitmask_bytes",
    "continuations",
    "footprint",
    "generation_agreement",
    "kl_divergence",
    "score",
    "speed",
    "windows",
]
