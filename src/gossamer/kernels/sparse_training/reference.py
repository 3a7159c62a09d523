"""The definition of the three products, in torch operations.

Works through the connections in pieces, so that gathered rows never take more than a few MiB.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gossamer.kernels.sparse_training.rows import Connections

__all__ = ["gradient_reference", "product_reference", "transposed_reference"]

_PIECE = 1 << 20  # gathered numbers at a time


def _pieces(matrix: Connections, batch: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the connections with their rows and columns as int64."""
    step = max(1, _PIECE // max(1, batch))
    rows = matrix.rows()
    for at in range(0, len(matrix), step):
        part = slice(at, at + step)
        yield part, rows[part], matrix.columns[part].long()


def product_reference(matrix: Connections, x: Tensor) -> Tensor:
    """W x: (O, I) stored times (I, B) gives (O, B)."""
    y = x.new_zeros(matrix.shape[0], x.shape[1])
    for part, rows, columns in _pieces(matrix, x.shape[1]):
        y.index_add_(0, rows, x[columns] * matrix.values[part, None])
    return y


def transposed_reference(matrix: Connections, delta: Tensor) -> Tensor:
    """W^T delta: (O, B) gives (I, B)."""
    x = delta.new_zeros(matrix.shape[1], delta.shape[1])
    for part, rows, columns in _pieces(matrix, delta.shape[1]):
        x.index_add_(0, columns, delta[rows] * matrix.values[part, None])
    return x


def gradient_reference(matrix: Connections, delta: Tensor, x: Tensor) -> Tensor:
    """The entries of delta x^T, (O, B) times (B, I), at the stored connections: (K,)."""
    parts = [(delta[r] * x[c]).sum(1) for _, r, c in _pieces(matrix, x.shape[1])]
    return torch.cat(parts) if parts else x.new_zeros(0)
