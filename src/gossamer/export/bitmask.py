"""Bitmask: the values that are not zero, and one bit a weight that says where they lie.

b bits a value and a share ρ kept take bρ + 1 bits a weight: 9/16 of dense bf16 at half the
weights, whatever the pattern. Shapes: R rows, C columns, K values kept.
"""

import numpy as np
import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.export.bits import as_floats, as_integers

__all__ = ["compress", "decompress", "mask_of", "pack_rows", "row_offsets", "unpack_rows"]


def mask_of(rows: Tensor, signed_zeros: bool = True) -> Tensor:
    """Which entries must be stored: all whose bits are not all zero.

    Parameters
    ----------
    rows : float32, bfloat16 or float16, contiguous, any shape.
    signed_zeros : keep -0.0, whose sign bit is set, as a value; False drops it as zero.
    """
    return as_integers(rows) != 0 if signed_zeros else rows != 0


def pack_rows(mask: Tensor) -> Tensor:
    """A mask (R, C) at one bit an entry, every row on whole bytes: uint8 (R, ceil(C / 8)).

    Column c is bit ``c % 8``, the least first, of byte ``c // 8``; bits past the last are zero.
    """
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def unpack_rows(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo :func:`pack_rows`.

    Raises
    ------
    GossamerError
        If the bytes are not those of a mask of this shape.
    """
    rows, columns = shape
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (rows, -(-columns // 8)):
        raise GossamerError(
            f"a bit mask of shape {shape} is uint8 of shape {(rows, -(-columns // 8))}; "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    bits = np.unpackbits(packed.numpy(), axis=1, bitorder="little").astype(bool)
    if bits[:, columns:].any():
        raise GossamerError(f"the bit mask has bits set past its {columns} columns")
    return torch.from_numpy(np.ascontiguousarray(bits[:, :columns]))


def row_offsets(mask: Tensor) -> Tensor:
    """Where each row's values begin among all values: int64 (R,)."""
    counts = mask.sum(dim=1)
    return counts.cumsum(0) - counts


def compress(rows: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Values (K,) in row-major order and the packed mask of a matrix (R, C)."""
    return {
        "compressed": as_floats(as_integers(rows)[mask], rows.dtype),
        "bitmask": pack_rows(mask),
    }


def decompress(values: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense matrix of values and a packed mask; what is not kept is +0.0.

    Raises
    ------
    GossamerError
        If the mask is not of this shape, or keeps another number than there are values.
    """
    mask = unpack_rows(packed, shape)
    kept = int(torch.count_nonzero(mask))
    if values.numel() != kept:
        raise GossamerError(f"the bit mask keeps {kept} values; {values.numel()} are stored")
    bits = as_integers(values.reshape(-1))
    dense = torch.zeros(shape, dtype=bits.dtype)
    dense[mask] = bits
    return as_floats(dense, values.dtype)
