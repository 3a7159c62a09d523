"""Packed: a matrix stored by its kept weights, in one of three layouts.

Shapes: O = rows (out features), I = columns (in features), K = kept weights, W = ceil(I / 64).
Values lie row after row, columns ascending. Values and column numbers end with :data:`PAD`
unused zeros, because kernels read whole vectors at the end.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, unknown
from gossamer.core.selection import pack_bits

__all__ = ["DTYPES", "LAYOUTS", "PAD", "Layout", "Packed", "best_layout", "kept_mask", "pack"]

Layout = Literal["bitmask", "csr", "fanin"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
DTYPES = (torch.float32, torch.bfloat16)
PAD = 16
_NARROW = 1 << 16  # columns that a number of 16 bits can name
_PIECE = 1 << 22  # entries looked at together while packing


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix of which only the kept weights are stored; made by :func:`pack`.

    Parameters
    ----------
    values : (K + 16,), float32 or bfloat16.
    index : ``bitmask``: int64, (O, W), bit c % 64 of word c // 64 is set where column c is kept;
        ``csr`` and ``fanin``: (K + 16,), the column of every value, uint16 for I up to 65,536,
        int32 beyond.
    start : int64, (O + 1,), where each row's values begin; empty for ``fanin``, where every row
        has K / O.
    shape : (O, I).
    layout : ``bitmask``, ``csr`` or ``fanin``.
    """

    values: Tensor
    index: Tensor
    start: Tensor
    shape: tuple[int, int]
    layout: Layout

    @property
    def kept(self) -> int:
        """K, the number of stored weights."""
        return len(self.values) - PAD

    @property
    def sparsity(self) -> float:
        """Share of the matrix that is not stored; 0 for an empty matrix."""
        total = self.shape[0] * self.shape[1]
        return 1.0 - self.kept / total if total else 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes stored, which are the bytes of the matrix that a product reads."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.index, self.start))

    def mask(self) -> Tensor:
        """bool, (O, I), True where a weight is kept."""
        return kept_mask(self.index, self.start, self.shape, self.layout, self.kept)

    def to_dense(self) -> Tensor:
        """The (O, I) matrix in the dtype of the values, every kept weight bit for bit."""
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.values.device)
        return dense.masked_scatter_(self.mask(), self.values)

    def check(self) -> "Packed":
        """Return self, or say what contradicts what; kernels read these tensors unguarded.

        Raises
        ------
        GossamerError
            If dtypes, sizes, row starts, columns or mask bits do not fit together.
        """
        rows, columns = self.shape
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        words = self.layout == "bitmask"
        fits = (
            self.values.dtype in DTYPES
            and self.kept >= 0
            and self.index.dtype == (torch.int64 if words else _column_dtype(columns))
            and tuple(self.index.shape)
            == ((rows, -(-columns // 64)) if words else (self.kept + PAD,))
            and self.start.dtype == torch.int64
            and len(self.start) == (0 if self.layout == "fanin" else rows + 1)
            and (self.layout != "fanin" or self.kept == self.kept // max(1, rows) * rows)
        )
        if not fits:
            raise GossamerError(
                f"tensors of a packed {rows}x{columns} matrix ({self.layout}) do not fit together; "
                "pack the matrix again"
            )
        counts = self.start.diff() if len(self.start) else None
        if counts is not None and (
            int(self.start[0]) != 0 or int(self.start[-1]) != self.kept or bool((counts < 0).any())
        ):
            raise GossamerError(f"row starts do not rise from 0 to {self.kept}; pack again")
        if words:
            set_bits = _unpack_words(self.index)
            beyond = bool(set_bits[:, columns:].any())
            if beyond or not torch.equal(set_bits.sum(1), self.start.diff()):
                raise GossamerError("mask bits and row starts disagree; pack the matrix again")
        elif self.kept and not _columns_ascend(self):
            raise GossamerError(
                f"columns of a row do not ascend below {columns}; pack the matrix again"
            )
        return self

    def __repr__(self) -> str:
        size = f"{self.shape[0]}x{self.shape[1]}"
        return (
            f"Packed({size}, {self.layout}, {str(self.dtype).removeprefix('torch.')}, "
            f"sparsity {self.sparsity:.4f}, {self.nbytes:,} bytes)"
        )


def _column_dtype(columns: int) -> torch.dtype:
    return torch.uint16 if columns <= _NARROW else torch.int32


def _rows_of(start: Tensor, rows: int, kept: int) -> Tensor:
    """The row of every stored value."""
    at = torch.arange(rows, device=start.device)
    if len(start):
        return torch.repeat_interleave(at, start.diff())
    return at.repeat_interleave(kept // max(1, rows))


def _columns_ascend(packed: Packed) -> bool:
    columns = packed.index[: packed.kept].to(torch.int64)
    place = _rows_of(packed.start, packed.shape[0], packed.kept) * packed.shape[1] + columns
    inside = int(columns.min()) >= 0 and int(columns.max()) < packed.shape[1]
    return inside and bool((place.diff() > 0).all())


def _unpack_words(words: Tensor) -> Tensor:
    """bool, (O, 64 W), from int64 words (O, W)."""
    shifts = torch.arange(64, device=words.device)
    return ((words[:, :, None] >> shifts) & 1).bool().flatten(1)


def kept_mask(
    index: Tensor, start: Tensor, shape: tuple[int, int], layout: Layout, kept: int
) -> Tensor:
    """bool (O, I), True where the tensors of a :class:`Packed` hold a weight."""
    rows, columns = shape
    if layout == "bitmask":
        step = max(1, _PIECE // max(1, columns))
        pieces = [_unpack_words(part)[:, :columns] for part in index.split(step)]
        return torch.cat(pieces) if rows else index.new_zeros(shape, dtype=torch.bool)
    mask = torch.zeros(shape, dtype=torch.bool, device=index.device)
    mask[_rows_of(start, rows, kept), index[:kept].to(torch.int64)] = True
    return mask


def best_layout(shape: tuple[int, int], kept: int, dtype: torch.dtype) -> Layout:
    """The layout that stores, and hence moves, fewer bytes: bitmask or csr."""
    total = shape[0] * shape[1]
    column = 2 if shape[1] <= _NARROW else 4
    return "bitmask" if total / 8 <= column * kept else "csr"


def pack(
    weight: Tensor,
    layout: Layout | Literal["auto"] = "auto",
    dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
) -> Packed:
    """Store a matrix by its kept weights.

    Parameters
    ----------
    weight : (O, I), real; float32 and bfloat16 are stored as they are.
    layout : ``bitmask`` (1 bit a weight), ``csr`` (2 bytes a kept weight, 4 beyond 65,536
        columns), ``fanin`` (csr without row starts, for rows that keep equally many), or
        ``auto``: the one of :func:`best_layout`.
    dtype : store as float32 or bfloat16, rounding if need be; that of the weight when left out.
    mask : bool, (O, I), what is kept; the weights other than 0 when left out. Then −0, which
        masking by a product leaves behind, is not kept and comes back as +0.

    Raises
    ------
    GossamerError
        For a tensor that is no real matrix, another dtype, NaN or infinite weights, or ``fanin``
        for rows that differ.
    """
    if weight.dim() != 2 or (mask is not None and mask.shape != weight.shape):
        seen = tuple(weight.shape) if mask is None else (tuple(weight.shape), tuple(mask.shape))
        raise GossamerError(f"packing takes a matrix and a mask of its shape; got {seen}")
    if layout != "auto" and layout not in LAYOUTS:
        raise unknown("layout", layout, ("auto", *LAYOUTS))
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in DTYPES or weight.is_complex():
        raise GossamerError(
            f"packed weights are float32 or bfloat16; got {dtype}: pass dtype=torch.float32"
        )
    dense = weight.detach().to(dtype)
    kept = dense != 0 if mask is None else mask.to(device=dense.device, dtype=torch.bool)
    values = dense[kept]
    if bad := int((~values.isfinite()).sum()):
        raise GossamerError(f"{bad} kept weights are NaN or infinite; repair the matrix first")
    shape = (weight.shape[0], weight.shape[1])
    counts = kept.sum(1)
    if layout == "auto":
        layout = best_layout(shape, len(values), dtype)
    if layout == "fanin" and len(counts) and int(counts.min()) != int(counts.max()):
        raise GossamerError(
            f"rows keep {int(counts.min())} to {int(counts.max())} weights, fanin takes equally "
            "many: use layout csr"
        )
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Packed(
        values=torch.cat([values, values.new_zeros(PAD)]),
        index=_words(kept) if layout == "bitmask" else _columns(kept),
        start=start[:0] if layout == "fanin" else start,
        shape=shape,
        layout=layout,
    )


def _words(kept: Tensor) -> Tensor:
    """int64, (O, W): bit c % 64 of word c // 64 is set where column c is kept."""
    rows, columns = kept.shape
    width = -(-columns // 64)
    padded = torch.nn.functional.pad(kept, (0, 64 * width - columns))
    return pack_bits(padded).view(torch.int64).view(rows, width)


def _columns(kept: Tensor) -> Tensor:
    rows, columns = kept.shape
    dtype = _column_dtype(columns)
    step = max(1, _PIECE // max(1, columns))
    pieces = [part.nonzero()[:, 1].to(dtype) for part in kept.split(step)] if rows else []
    return torch.cat([*pieces, torch.zeros(PAD, dtype=dtype, device=kept.device)])
