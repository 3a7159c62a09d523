"""Sparse codes (values, indices) of wide dictionaries: choose, decode, and sparse gradients."""

from gossamer.kernels.sparse_code.op import decode, encode_at, top_rows

__all__ = ["decode", "encode_at", "top_rows"]
