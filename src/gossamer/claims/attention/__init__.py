"""Claims of the attention family."""
