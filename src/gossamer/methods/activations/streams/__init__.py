"""Networks over streams of frames: layers that compute with what changed."""
