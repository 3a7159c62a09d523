"""Several methods on one model, and methods side by side."""
