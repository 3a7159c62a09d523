"""Concepts: what labelled texts say about single units of a model or a dictionary."""
