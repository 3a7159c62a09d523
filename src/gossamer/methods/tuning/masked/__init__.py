"""Frozen matrices with a low-rank update behind a mask that is learned."""
