"""Sparsity before and during training."""
