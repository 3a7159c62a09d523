"""Automated interpretation: say in words when a latent fires, and test what was said."""
