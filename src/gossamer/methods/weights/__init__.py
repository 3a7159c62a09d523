"""Weight sparsity after training."""
