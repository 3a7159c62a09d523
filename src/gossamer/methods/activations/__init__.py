"""Activation sparsity at inference: channels that are small for this token are not read."""
