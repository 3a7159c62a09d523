"""N:M: of every M neighbouring inputs at most N values, each with its place in the group.

b bits a value take N/M · (b + ceil(log2 M)) bits a weight; at 2:4 that is b/2 + 1. Groups with
fewer than N values that are not zero are filled up with zeros at the lowest free places, so that
every group is the same size and a kernel finds it by arithmetic. Shapes: R rows, C columns.
"""

import numpy as np
import torch
from torch import Tensor

from gossamer.core import NM, GossamerError
from gossamer.export.bits import as_floats, as_integers

__all__ = ["compress", "decompress", "gather", "index_bits", "misfit", "places"]


def index_bits(pattern: NM) -> int:
    """Bits of a place in a group of M."""
    return max(1, (pattern.of - 1).bit_length())


def misfit(mask: Tensor, pattern: NM) -> str | None:
    """Where a mask (R, C) breaks the pattern, in words; None where it fits."""
    rows, columns = mask.shape
    if columns % pattern.of:
        return f"its {columns} inputs are not a multiple of {pattern.of}"
    counts = mask.view(rows, -1, pattern.of).sum(dim=2)
    wrong = (counts > pattern.keep).nonzero()
    if not len(wrong):
        return None
    row, group = (int(x) for x in wrong[0])
    first = group * pattern.of
    return (
        f"output {row} keeps {int(counts[row, group])} of inputs {first} to "
        f"{first + pattern.of - 1}"
    )


def places(mask: Tensor, pattern: NM) -> Tensor:
    """Ascending places (R, C / M, N) stored of each group of a mask that fits."""
    groups = mask.view(mask.shape[0], -1, pattern.of)
    # Stable: the kept ones first, then the free ones, both from the lowest place up.
    order = torch.argsort((~groups).to(torch.uint8), dim=2, stable=True)
    return order[:, :, : pattern.keep].sort(dim=2).values


def gather(rows: Tensor, mask: Tensor, at: Tensor, pattern: NM) -> Tensor:
    """The values (R, C / M · N) at these places; +0.0 where a group is filled up."""
    groups = (as_integers(rows) * mask).view(rows.shape[0], -1, pattern.of)
    return as_floats(groups.gather(2, at).reshape(rows.shape[0], -1), rows.dtype)


def compress(rows: Tensor, mask: Tensor, pattern: NM) -> dict[str, Tensor]:
    """Values (R, C / M · N) and their places, packed to ``index_bits`` each, least bit first."""
    at = places(mask, pattern)
    shifts = np.arange(index_bits(pattern), dtype=np.uint8)
    bits = (at.reshape(-1, 1).numpy().astype(np.uint8) >> shifts) & 1
    packed = np.packbits(bits.reshape(-1), bitorder="little")
    return {"values": gather(rows, mask, at, pattern), "indices": torch.from_numpy(packed)}


def decompress(values: Tensor, indices: Tensor, shape: tuple[int, int], pattern: NM) -> Tensor:
    """The dense matrix of values and packed places.

    Raises
    ------
    GossamerError
        If the sizes do not belong to this shape, or places repeat or lie outside a group.
    """
    rows, columns = shape
    groups, width = columns // pattern.of, index_bits(pattern)
    count = rows * groups * pattern.keep
    size = (count * width + 7) // 8
    if columns % pattern.of or tuple(values.shape) != (rows, groups * pattern.keep):
        raise GossamerError(
            f"{pattern} values of a matrix {shape} have shape {(rows, groups * pattern.keep)}; "
            f"got {tuple(values.shape)}"
        )
    if indices.dtype != torch.uint8 or tuple(indices.shape) != (size,):
        raise GossamerError(
            f"{pattern} places of a matrix {shape} are {size} bytes; "
            f"got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    bits = np.unpackbits(indices.numpy(), count=count * width, bitorder="little")
    place = (bits.reshape(count, width) << np.arange(width, dtype=np.uint8)).sum(
        axis=1, dtype=np.int64
    )
    at = torch.from_numpy(place).view(rows, groups, pattern.keep)
    if bool((at >= pattern.of).any()) or bool((at.diff(dim=2) <= 0).any()):
        raise GossamerError(f"the places do not ascend within groups of {pattern.of}")
    numbers = as_integers(values)
    dense = torch.zeros(rows, groups, pattern.of, dtype=numbers.dtype)
    dense.scatter_(2, at, numbers.view(rows, groups, pattern.keep))
    return as_floats(dense.view(rows, columns), values.dtype)
