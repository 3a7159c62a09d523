"""Choosing keys on a GPU: attention of the last queries, block means, cuts by mass, block lists."""

from gossamer.kernels.attention_select.lists import (
    Tiling,
    block_lists,
    cover_lines,
    pooled_share,
    top_lines,
)
from gossamer.kernels.attention_select.op import block_means, last_mass, mass_cut, select_refusal

__all__ = [
    "Tiling",
    "block_lists",
    "block_means",
    "cover_lines",
    "last_mass",
    "mass_cut",
    "pooled_share",
    "select_refusal",
    "top_lines",
]
