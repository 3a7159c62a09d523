"""Attention over listed blocks of keys: block-sparse prefill."""

from gossamer.kernels.block_attention.op import block_attention, block_backend, block_refusal

__all__ = ["block_attention", "block_backend", "block_refusal"]
