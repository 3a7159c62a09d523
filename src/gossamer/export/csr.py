"""CSR: per row the values that are not zero and their columns, in ``.npz`` files scipy reads.

b bits a value take (b + 16)ρ bits a weight: columns are stored in 16 bits (32 where a row is
longer than 65,536). It beats a bit mask only where less than 1/16 is kept. scipy has no 16-bit
floats: bf16 and fp16 values are stored as their bits (uint16), and a view gives them back.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.export.bits import as_floats, as_integers

__all__ = ["column_bits", "compress", "decompress", "read", "write"]

_NUMPY = {torch.float32: np.float32, torch.float16: np.uint16, torch.bfloat16: np.uint16}
_PARTS = ("data", "indices", "indptr")


def column_bits(columns: int) -> int:
    """Bits of a stored column index."""
    return 16 if columns <= 1 << 16 else 32


def compress(rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Values (K,), columns (K,) and row bounds (R + 1,) of a matrix (R, C)."""
    narrow = column_bits(rows.shape[1]) == 16
    columns = mask.nonzero()[:, 1].to(torch.uint16 if narrow else torch.int32)
    bounds = torch.zeros(rows.shape[0] + 1, dtype=torch.int64)
    bounds[1:] = mask.sum(dim=1).cumsum(0)
    small = int(bounds[-1]) < 1 << 31
    return {
        "data": as_floats(as_integers(rows)[mask], rows.dtype),
        "indices": columns,
        "indptr": bounds.to(torch.int32) if small else bounds,
    }


def decompress(parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The dense matrix.

    Raises
    ------
    GossamerError
        If the bounds or columns do not belong to this shape.
    """
    rows, columns = shape
    data, at, bounds = parts["data"], parts["indices"].long(), parts["indptr"].long()
    if bounds.shape != (rows + 1,) or int(bounds[0]) != 0 or bool((bounds.diff() < 0).any()):
        raise GossamerError(f"indptr is not {rows + 1} ascending row bounds from 0")
    if data.shape != at.shape or data.dim() != 1 or int(bounds[-1]) != len(data):
        raise GossamerError(
            f"indptr ends at {int(bounds[-1])}; {len(data)} values and {len(at)} columns are stored"
        )
    start = torch.repeat_interleave(torch.arange(rows) * columns, bounds.diff())
    flat = start + at
    outside = len(at) and (int(at.min()) < 0 or int(at.max()) >= columns)
    if outside or bool((flat.diff() <= 0).any()):
        raise GossamerError(f"columns do not ascend within rows of {columns}")
    numbers = as_integers(data)
    dense = torch.zeros(rows * columns, dtype=numbers.dtype)
    dense[flat] = numbers
    return as_floats(dense.view(rows, columns), data.dtype)


def write(path: Path, parts: dict[str, Tensor], shape: tuple[int, int]) -> None:
    """Write one matrix with the names ``scipy.sparse.load_npz`` looks for."""
    data = parts["data"]
    values = data if data.dtype == torch.float32 else data.view(torch.uint16)
    np.savez(
        path,
        format=np.array(b"csr"),
        shape=np.array(shape),
        data=values.numpy(),
        indices=parts["indices"].numpy(),
        indptr=parts["indptr"].numpy(),
    )


def read(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The arrays of one matrix; nothing is unpickled.

    Raises
    ------
    GossamerError
        If the file is damaged or holds values of another dtype.
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _PARTS}
        if arrays["data"].dtype != _NUMPY[dtype]:
            raise ValueError(f"values are {arrays['data'].dtype}, not those of {dtype}")
        if any(arrays[name].dtype.kind not in "iu" for name in _PARTS[1:]):
            raise ValueError("indices are not whole numbers")
        parts = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except Exception as error:
        raise GossamerError(
            f"{path} is missing or damaged ({error}); export the model again"
        ) from None
    parts["data"] = parts["data"].view(dtype)
    return parts
