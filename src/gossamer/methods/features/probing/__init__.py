"""Sparse probing: do a dictionary's latents tell labels apart better than plain activations?"""
