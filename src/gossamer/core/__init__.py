"""The vocabulary of sparsity: torch only, no models, no methods."""

from gossamer.core.budget import Budget, check_count, check_sparsity, kept_count
from gossamer.core.card import FAMILIES, Card, System, systems
from gossamer.core.errors import GossamerError, UnsupportedModel, nearest, unknown
from gossamer.core.method import Method
from gossamer.core.pattern import (
    NM,
    Block,
    Channels,
    Pattern,
    Unstructured,
    Window,
    parse_pattern,
    topk_mask,
)
from gossamer.core.rows import SparseRows
from gossamer.core.selection import Selection, pack_bits, unpack_bits
from gossamer.core.site import ROLES, Site
from gossamer.core.stats import Accumulator, QuantileSketch, Stat

__all__ = [
    "FAMILIES",
    "NM",
    "ROLES",
    "Accumulator",
    "Block",
    "Budget",
    "Card",
    "Channels",
    "GossamerError",
    "Method",
    "Pattern",
    "QuantileSketch",
    "Selection",
    "Site",
    "SparseRows",
    "Stat",
    "System",
    "Unstructured",
    "UnsupportedModel",
    "Window",
    "check_count",
    "check_sparsity",
    "kept_count",
    "nearest",
    "pack_bits",
    "parse_pattern",
    "systems",
    "topk_mask",
    "unknown",
    "unpack_bits",
]
