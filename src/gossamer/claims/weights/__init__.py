"""Claims of the weights family."""
