"""Pruning by consumed compute, parameters active over a training, and the law of their loss."""
