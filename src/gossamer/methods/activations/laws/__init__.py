"""How sparse a model's activations are at a price, and how that grows with training."""
