"""What puts trainable parameters beside frozen matrices, steps them, and takes them away."""
