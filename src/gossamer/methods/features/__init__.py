"""Sparse dictionaries of activations: train, encode, splice."""
