"""Claims of the features family."""
