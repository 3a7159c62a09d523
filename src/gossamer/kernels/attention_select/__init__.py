"""Choosing keys on a GPU: attention of the last queries, block means, cuts by mass."""

from gossamer.kernels.attention_select.op import block_means, last_mass, mass_cut, select_refusal

__all__ = ["block_means", "last_mass", "mass_cut", "select_refusal"]
