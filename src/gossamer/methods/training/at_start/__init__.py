"""Masks found before training, from scores of the untrained network."""
