"""Masked-diffusion language models: a tiny one, its training and sampling, and their attention."""
