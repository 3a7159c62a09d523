"""Attention of one token over listed pages of keys, and the choice of the pages."""

from gossamer.kernels.page_attention.op import (
    page_attention,
    page_bounds,
    page_decode,
    page_refusal,
    page_scores,
)

__all__ = ["page_attention", "page_bounds", "page_decode", "page_refusal", "page_scores"]
