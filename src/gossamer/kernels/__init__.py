"""Kernels: one folder per operation, each with its plain definition beside it.

Importing this package registers the operators with torch (``torch.ops.gossamer``) and compiles
nothing: C++ is built on the first call.
"""

from gossamer.kernels.nm_select.op import nm_mask, register

__all__ = ["nm_mask", "register"]

register()
