"""Claims of sparse training."""
