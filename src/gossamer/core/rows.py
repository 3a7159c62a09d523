"""SparseRows: (values, indices, shape), the common form of codes, sparse vectors and deltas.

Shapes: R = rows, C = columns, K = stored entries, W = entries a padded row has room for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.core.rank import topk_mask

__all__ = ["SparseRows"]


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A matrix with few entries per row, in CSR or padded form.

    Parameters
    ----------
    values : (K,) with ``indptr``, or (R, W) padded, where padding has index -1 and value 0.
    indices : int64, the shape of ``values``; columns, none twice in a row.
    shape : (R, C).
    indptr : int64, (R + 1,), or None for the padded form.
    """

    values: Tensor
    indices: Tensor
    shape: tuple[int, int]
    indptr: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.values.shape != self.indices.shape:
            raise GossamerError(
                f"values {tuple(self.values.shape)} and indices {tuple(self.indices.shape)} differ"
            )
        if self.indptr is None and (self.values.dim() != 2 or len(self.values) != rows):
            raise GossamerError(
                f"padded rows of a {self.shape} matrix are ({rows}, W); "
                f"got {tuple(self.values.shape)}"
            )
        if self.indptr is not None and (
            len(self.indptr) != rows + 1
            or int(self.indptr[0]) != 0
            or int(self.indptr[-1]) != len(self.values)
            or bool((self.indptr.diff() < 0).any())
        ):
            raise GossamerError(
                f"indptr of {rows} rows has {rows + 1} entries that rise from 0 to "
                f"{len(self.values)}; got {len(self.indptr)} entries"
            )
        if self.indices.numel() and (
            int(self.indices.max()) >= columns or int(self.indices.min()) < -1
        ):
            raise GossamerError(f"an index lies outside the {columns} columns")

    @classmethod
    def from_dense(cls, dense: Tensor) -> "SparseRows":
        """CSR of the non-zero entries of (R, C)."""
        rows, columns = dense.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=dense.shape[0])
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(dense[rows, columns], columns, (dense.shape[0], dense.shape[1]), indptr)

    @classmethod
    def from_topk(cls, dense: Tensor, keep: int) -> "SparseRows":
        """Padded form of the ``keep`` largest entries of each row, (R, keep).

        Columns ascend within a row; ties go to the lower column; gradients flow to the values.
        """
        rows, columns = dense.shape
        if not 0 <= keep <= columns:
            raise GossamerError(f"keep is {keep}; rows of {columns} columns keep 0 to {columns}")
        indices = topk_mask(dense.detach(), keep).nonzero()[:, 1].view(rows, keep)
        return cls(dense.gather(1, indices), indices, (rows, columns))

    def _rows(self) -> Tensor:
        assert self.indptr is not None
        at = torch.arange(self.shape[0], device=self.indptr.device)
        return torch.repeat_interleave(at, self.indptr.diff())

    def to_csr(self) -> "SparseRows":
        """The CSR form; padding is dropped, order inside a row kept."""
        if self.indptr is not None:
            return self
        real = self.indices >= 0
        counts = real.sum(1)
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseRows(self.values[real], self.indices[real], self.shape, indptr)

    def to_padded(self) -> "SparseRows":
        """The padded form, as wide as the longest row."""
        if self.indptr is None:
            return self
        counts = self.indptr.diff()
        width = int(counts.max()) if len(counts) else 0
        values = self.values.new_zeros(self.shape[0], width)
        indices = self.indices.new_full((self.shape[0], width), -1)
        rows = self._rows()
        slot = torch.arange(len(rows), device=rows.device) - self.indptr[rows]
        return SparseRows(
            values.index_put((rows, slot), self.values),
            indices.index_put((rows, slot), self.indices),
            self.shape,
        )

    def to_dense(self) -> Tensor:
        """The (R, C) matrix; differentiable in the values."""
        csr = self.to_csr()
        out = csr.values.new_zeros(self.shape)
        return out.index_put((csr._rows(), csr.indices), csr.values)

    def matmul(self, dense: Tensor) -> Tensor:
        """(R, C) @ (C, D) -> (R, D), reading only the rows of ``dense`` that are named."""
        csr = self.to_csr()
        assert csr.indptr is not None
        out = dense.new_zeros(self.shape[0], dense.shape[1])
        terms = csr.values[:, None].to(dense.dtype) * dense[csr.indices]
        return out.index_add(0, csr._rows(), terms)

    @property
    def stored(self) -> int:
        """Number of entries, padding not counted."""
        return int((self.indices >= 0).sum())

    def __repr__(self) -> str:
        form = "padded" if self.indptr is None else "CSR"
        mean = self.stored / max(1, self.shape[0])
        return f"SparseRows({self.shape[0]}x{self.shape[1]}, {mean:.1f} entries a row, {form})"
