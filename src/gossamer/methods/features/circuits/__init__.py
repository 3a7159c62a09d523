"""Circuits of attention heads: found from sparse codes, and marked against ablation."""
