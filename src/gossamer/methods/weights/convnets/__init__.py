"""Pointwise convolutions: where they are, how they are pruned in training, and what runs them."""
