"""What selectors of prompts share: where blocks stand, and what the last queries read."""

from gossamer.methods.attention.estimate.fast import (
    covered_lists,
    covering,
    line_lists,
    means,
    on_device,
    plain,
    plain_share,
)
from gossamer.methods.attention.estimate.grid import Grid
from gossamer.methods.attention.estimate.tail import Tail, last_mass, tail_mass, tails
from gossamer.methods.attention.estimate.tree import Found, tree_top_blocks

__all__ = [
    "Found",
    "Grid",
    "Tail",
    "covered_lists",
    "covering",
    "last_mass",
    "line_lists",
    "means",
    "on_device",
    "plain",
    "plain_share",
    "tail_mass",
    "tails",
    "tree_top_blocks",
]
