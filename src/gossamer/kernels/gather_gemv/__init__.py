"""Gathered products: reading only the rows of a matrix that a token needs."""

from gossamer.kernels.gather_gemv.op import axpy_gemv, dot_gemv, gated_mlp
from gossamer.kernels.gather_gemv.rows import Rows, rows

__all__ = ["Rows", "axpy_gemv", "dot_gemv", "gated_mlp", "rows"]
