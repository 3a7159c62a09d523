"""Claims of the activations family."""
