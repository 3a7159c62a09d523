"""gossamer: neural networks made sparse."""
