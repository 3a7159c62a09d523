"""Kernels: one folder per operation, each with its plain definition beside it.

Importing this package registers the operators with torch (``torch.ops.gossamer``) and compiles
nothing: C++ is built on the first call.
"""

from gossamer.kernels.nm_select.op import nm_mask, register
from gossamer.kernels.sparse_linear import Packed, SparseLinear, pack, sparse_linear
from gossamer.kernels.sparse_linear.op import register as register_sparse_linear

__all__ = ["Packed", "SparseLinear", "nm_mask", "pack", "register", "sparse_linear"]

register()
register_sparse_linear()
