"""Executable claims, one module per method."""
