"""Sparse attention at inference."""
