"""Core neurons: chosen once for a prompt, gathered into small matrices, used for its answer."""
