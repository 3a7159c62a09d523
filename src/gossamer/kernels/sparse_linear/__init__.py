"""Sparse linear: y = x Wᵀ reading only the weights that are kept."""

from gossamer.kernels.sparse_linear.module import SparseLinear
from gossamer.kernels.sparse_linear.op import sparse_linear
from gossamer.kernels.sparse_linear.pack import Packed, pack

__all__ = ["Packed", "SparseLinear", "pack", "sparse_linear"]
