"""Searching for a sparse network before it is trained: its hidden units, and the search itself."""
