"""Sparse linear: y = x Wᵀ reading only the weights that are kept."""

from gossamer.kernels.sparse_linear.module import SparseLinear
from gossamer.kernels.sparse_linear.op import sparse_linear
from gossamer.kernels.sparse_linear.pack import Packed, pack
from gossamer.kernels.sparse_linear.tiled import Tiled, tile
from gossamer.kernels.sparse_linear.tiled_op import tiled_linear

__all__ = ["Packed", "SparseLinear", "Tiled", "pack", "sparse_linear", "tile", "tiled_linear"]
