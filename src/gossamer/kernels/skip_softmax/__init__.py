"""Attention that computes all scores and skips the rest of tiles far below the largest."""

from gossamer.kernels.skip_softmax.op import skip_refusal, skip_softmax, skip_softmax_decode

__all__ = ["skip_refusal", "skip_softmax", "skip_softmax_decode"]
