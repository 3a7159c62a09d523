"""White-box transformer blocks: compression by subspace attention, sparsification by ISTA."""
