"""Selection: what is kept, and in which encoding.

Three encodings of one fact: a boolean mask, ragged indices per row (CSR without values), and
kept blocks. Conversions are explicit, so nothing is densified behind a caller's back.
Shapes: R = rows, C = columns, K = kept entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

__all__ = ["Selection", "pack_bits", "unpack_bits"]

_SHIFTS = tuple(range(8))


def pack_bits(mask: Tensor) -> Tensor:
    """Store a mask at one bit an entry.

    Parameters
    ----------
    mask : bool tensor of any shape, n entries in row-major order.

    Returns
    -------
    uint8 tensor of ``ceil(n / 8)`` bytes; entry i is bit ``i % 8`` (least first) of byte i // 8.
    """
    flat = mask.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    packed = torch.zeros(padded.shape[0], dtype=torch.uint8, device=mask.device)
    for bit in _SHIFTS:
        packed |= padded[:, bit] << bit
    return packed


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`pack_bits` for a mask of the given shape."""
    count = int(torch.Size(shape).numel())
    if packed.dtype != torch.uint8 or packed.numel() != (count + 7) // 8:
        raise GossamerError(
            f"a packed mask of shape {tuple(shape)} takes {(count + 7) // 8} bytes of uint8; "
            f"got {packed.numel()} of {packed.dtype}"
        )
    bits = torch.stack([(packed >> bit) & 1 for bit in _SHIFTS], dim=1)
    return bits.reshape(-1)[:count].reshape(shape).bool()


@dataclass(frozen=True, eq=False)
class Selection:
    """The entries of a tensor that a method keeps.

    Made by :meth:`from_mask`, :meth:`from_indices` or :meth:`from_blocks`; read as
    :meth:`mask`, :meth:`indices` or :meth:`blocks`. It does not hold values, does not follow
    its tensor to another device, and is no sparse tensor for arithmetic: kernels read the
    encoding that suits them.

    Parameters
    ----------
    shape : shape of the tensor selected from.
    kept : number of kept entries.
    """

    shape: tuple[int, ...]
    kept: int
    _mask: Tensor | None = None
    _indptr: Tensor | None = None
    _indices: Tensor | None = None
    _blocks: Tensor | None = None
    _block_shape: tuple[int, int] | None = None

    # -- making ----------------------------------------------------------------------------

    @classmethod
    def from_mask(cls, mask: Tensor, kept: int | None = None) -> "Selection":
        """From a bool tensor, True where kept.

        Parameters
        ----------
        kept : number of True entries, for a caller that knows it; counted when left out.
        """
        if mask.dtype != torch.bool:
            raise GossamerError(f"a mask is of dtype bool; got {mask.dtype}")
        count = int(torch.count_nonzero(mask)) if kept is None else kept
        return cls(tuple(mask.shape), count, _mask=mask)

    @classmethod
    def from_indices(cls, indptr: Tensor, indices: Tensor, shape: tuple[int, int]) -> "Selection":
        """From ragged rows: row r keeps columns ``indices[indptr[r]:indptr[r + 1]]``, ascending.

        Parameters
        ----------
        indptr : int64, R + 1.
        indices : int64, K.
        shape : (R, C).
        """
        rows, columns = shape
        if indptr.numel() != rows + 1 or int(indptr[0]) != 0 or int(indptr[-1]) != len(indices):
            raise GossamerError(
                f"indptr of a {shape} selection has {rows + 1} entries from 0 to {len(indices)}; "
                f"got {indptr.numel()} entries"
            )
        if bool((indptr.diff() < 0).any()):
            raise GossamerError("indptr of a selection never decreases")
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= columns):
            raise GossamerError(f"an index of a selection lies outside its {columns} columns")
        starts = torch.repeat_interleave(torch.arange(rows), indptr.diff().cpu()) * columns
        if bool(((starts + indices.cpu()).diff() <= 0).any()):
            raise GossamerError("indices of a selection ascend within a row, none twice")
        return cls((rows, columns), len(indices), _indptr=indptr, _indices=indices)

    @classmethod
    def from_blocks(
        cls, blocks: Tensor, block_shape: tuple[int, int], shape: tuple[int, int]
    ) -> "Selection":
        """From kept blocks.

        Parameters
        ----------
        blocks : bool, (ceil(R / h), ceil(C / w)), True where the whole block is kept.
        block_shape : (h, w).
        shape : (R, C); the last block of a row or column may be cut by the edge.
        """
        (rows, columns), (high, wide) = shape, block_shape
        expected = (-(-rows // high), -(-columns // wide))
        if tuple(blocks.shape) != expected:
            raise GossamerError(
                f"{shape} in blocks of {block_shape} has {expected} blocks; "
                f"got {tuple(blocks.shape)}"
            )
        heights = (rows - high * torch.arange(expected[0])).clamp_max(high)
        widths = (columns - wide * torch.arange(expected[1])).clamp_max(wide)
        kept = int((blocks.cpu() * heights[:, None] * widths[None, :]).sum())
        return cls((rows, columns), kept, _blocks=blocks, _block_shape=(high, wide))

    @classmethod
    def everything(cls, shape: tuple[int, ...], device: torch.device | None = None) -> "Selection":
        """The selection that removes nothing."""
        return cls.from_mask(torch.ones(shape, dtype=torch.bool, device=device))

    # -- reading ---------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Number of entries selected from."""
        return int(torch.Size(self.shape).numel())

    @property
    def density(self) -> float:
        """Share kept; 1 for an empty tensor."""
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        """Share removed."""
        return 1.0 - self.density

    def mask(self) -> Tensor:
        """As a bool tensor of :attr:`shape`, True where kept; the selection's own, not a copy."""
        if self._mask is not None:
            return self._mask
        if self._blocks is not None:
            assert self._block_shape is not None
            rows, columns = self.shape
            high, wide = self._block_shape
            spread = self._blocks.repeat_interleave(high, 0)[:rows]
            return spread.repeat_interleave(wide, 1)[:, :columns]
        assert self._indptr is not None
        assert self._indices is not None
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self._indices.device)
        rows = torch.repeat_interleave(
            torch.arange(self.shape[0], device=self._indptr.device), self._indptr.diff()
        )
        mask[rows, self._indices] = True
        return mask

    def indices(self) -> tuple[Tensor, Tensor]:
        """As ragged rows ``(indptr, indices)``; rows are the first axis, the rest flattened."""
        if self._indptr is not None and self._indices is not None:
            return self._indptr, self._indices
        mask = self.mask()
        mask = mask.reshape(mask.shape[0], -1) if mask.dim() > 1 else mask.reshape(1, -1)
        counts = mask.sum(1)
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return indptr, mask.nonzero()[:, 1]

    def blocks(self, block_shape: tuple[int, int]) -> Tensor:
        """As kept blocks of the given size.

        Raises
        ------
        GossamerError
            If a block is kept in part: that selection has no exact block form.
        """
        if self._blocks is not None and self._block_shape == tuple(block_shape):
            return self._blocks
        if len(self.shape) != 2:
            raise GossamerError(f"blocks need a matrix; this selection has shape {self.shape}")
        (rows, columns), (high, wide) = self.shape, block_shape
        pad = (0, -columns % wide, 0, -rows % high)
        mask = self.mask()
        grid = torch.nn.functional.pad(mask, pad)
        grid = grid.view(-(-rows // high), high, -(-columns // wide), wide)
        some = grid.any(3).any(1)
        back = Selection.from_blocks(some, (high, wide), (rows, columns))
        if back.kept != self.kept:
            raise GossamerError(
                f"blocks of {high}x{wide} are kept in part; choose the block of the pattern"
            )
        return some

    def apply_(self, tensor: Tensor) -> Tensor:
        """Set the removed entries of a tensor of :attr:`shape` to zero, in place."""
        if tuple(tensor.shape) != self.shape:
            raise GossamerError(
                f"a selection of shape {self.shape} meets a tensor of shape {tuple(tensor.shape)}"
            )
        return tensor.masked_fill_(~self.mask().to(tensor.device), 0)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return self.shape == other.shape and bool(torch.equal(self.mask(), other.mask()))

    def __repr__(self) -> str:
        forms = {"mask": self._mask, "blocks": self._blocks, "rows": self._indices}
        form = next(name for name, tensor in forms.items() if tensor is not None)
        size = "x".join(map(str, self.shape))
        return (
            f"Selection({size}, kept {self.kept:,} of {self.total:,}, "
            f"sparsity {self.sparsity:.4f}, {form})"
        )
