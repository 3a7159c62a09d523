"""Attention patterns that a model is trained under: training with the pattern in place, undo."""
