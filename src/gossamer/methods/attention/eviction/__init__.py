"""Cache layers that hold less: fewer keys, or keys in fewer bits."""
