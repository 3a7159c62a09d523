"""Search for architectures: operations to choose from, networks that mix them, and the search."""
