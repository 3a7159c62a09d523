"""What selectors of prompts share: where blocks stand, and what the last queries read."""

from gossamer.methods.attention.estimate.grid import Grid
from gossamer.methods.attention.estimate.tail import Tail, last_mass, tails

__all__ = ["Grid", "Tail", "last_mass", "tails"]
