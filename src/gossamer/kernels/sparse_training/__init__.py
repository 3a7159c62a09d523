"""Products of training with stored connections only: forward, backward, and their gradient."""

from gossamer.kernels.sparse_training.op import (
    connection_gradient,
    sparse_product,
    transposed_product,
)
from gossamer.kernels.sparse_training.rows import Connections

__all__ = ["Connections", "connection_gradient", "sparse_product", "transposed_product"]
