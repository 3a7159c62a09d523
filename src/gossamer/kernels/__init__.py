"""Kernels: one folder per operation, each with its plain definition beside it.

Importing this package registers the operators with torch (``torch.ops.gossamer``) and compiles
nothing: C++ is built on the first call.
"""

from gossamer.kernels.block_attention import block_attention
from gossamer.kernels.block_attention.op import register as register_block_attention
from gossamer.kernels.gather_gemv import Rows, axpy_gemv, dot_gemv, gated_mlp, rows
from gossamer.kernels.gather_gemv.op import register as register_gather_gemv
from gossamer.kernels.nm_select.op import nm_mask, register
from gossamer.kernels.sparse_conv import PackedConv, SparseConv1x1, pack_conv, sparse_conv
from gossamer.kernels.sparse_conv.op import register as register_sparse_conv
from gossamer.kernels.sparse_linear import Packed, SparseLinear, pack, sparse_linear
from gossamer.kernels.sparse_linear.op import register as register_sparse_linear

__all__ = [
    "Packed",
    "PackedConv",
    "Rows",
    "SparseConv1x1",
    "SparseLinear",
    "axpy_gemv",
    "block_attention",
    "dot_gemv",
    "gated_mlp",
    "nm_mask",
    "pack",
    "pack_conv",
    "register",
    "rows",
    "sparse_conv",
    "sparse_linear",
]

register()
register_gather_gemv()
register_sparse_conv()
register_sparse_linear()
register_block_attention()
