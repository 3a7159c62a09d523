"""Connections: a weight matrix of which only the existing connections are stored (CSR)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

__all__ = ["Connections"]


@dataclass(frozen=True, eq=False)
class Connections:
    """A matrix (O, I) of K stored connections, row by row, columns ascending within a row.

    Parameters
    ----------
    values : (K,), float32 or float64. columns : int32, (K,). start : int64, (O + 1,).
    shape : (O, I).
    """

    values: Tensor
    columns: Tensor
    start: Tensor
    shape: tuple[int, int]

    @classmethod
    def at(cls, values: Tensor, places: Tensor, shape: tuple[int, int]) -> "Connections":
        """From values and their row-major positions.

        Parameters
        ----------
        values : (K,). places : int64, (K,), row * I + column, ascending, none twice.

        Raises
        ------
        GossamerError
            If positions do not ascend or lie outside the matrix.
        """
        rows, columns = shape
        outside = len(places) > 0 and not 0 <= int(places[0]) <= int(places[-1]) < rows * columns
        if outside or bool((places.diff() <= 0).any()):
            raise GossamerError(
                f"connections of a {rows}x{columns} matrix take ascending positions from 0 to "
                f"{rows * columns - 1}, none twice"
            )
        row = torch.div(places, columns, rounding_mode="floor")
        counts = torch.bincount(row, minlength=rows)
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(values, (places - row * columns).to(torch.int32), start, shape)

    def rows(self) -> Tensor:
        """The row of every connection, int64, (K,)."""
        return torch.repeat_interleave(torch.arange(self.shape[0]), self.start.diff())

    def places(self) -> Tensor:
        """The row-major position of every connection, int64, (K,)."""
        return self.rows() * self.shape[1] + self.columns

    def dense(self) -> Tensor:
        """The matrix, (O, I), zeros written out."""
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_copy_(0, self.places(), self.values).view(self.shape)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def sparsity(self) -> float:
        """Share of the matrix that is not stored."""
        return 1.0 - len(self) / (self.shape[0] * self.shape[1])
