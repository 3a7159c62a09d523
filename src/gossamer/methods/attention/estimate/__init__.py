"""What selectors of prompts share: where blocks stand, and what the last queries read."""

from gossamer.methods.attention.estimate.fast import covering, means
from gossamer.methods.attention.estimate.grid import Grid
from gossamer.methods.attention.estimate.tail import Tail, last_mass, tail_mass, tails
from gossamer.methods.attention.estimate.tree import Found, tree_top_blocks

__all__ = [
    "Found",
    "Grid",
    "Tail",
    "covering",
    "last_mass",
    "means",
    "tail_mass",
    "tails",
    "tree_top_blocks",
]
