"""A small scorer of keys, trained to point where attention looks, and the search it serves."""
