"""Sparse convolution: 1x1 kernels that read only the weights that are kept."""

from gossamer.kernels.sparse_conv.module import SparseConv1x1
from gossamer.kernels.sparse_conv.op import sparse_conv
from gossamer.kernels.sparse_conv.pack import PackedConv, best_block, pack_conv

__all__ = ["PackedConv", "SparseConv1x1", "best_block", "pack_conv", "sparse_conv"]
