"""Where a curve of loss over sparsity bends, and when a training made its weights small."""
