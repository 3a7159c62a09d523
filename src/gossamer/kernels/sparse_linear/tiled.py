"""Tiled: a matrix stored for GPUs, 32 rows side by side, so that threads read what lies together.

Two kinds. ``2:4``: two weights of every four columns and their places, 2 bits each. ``gaps``: any
kept weights in the order of their columns, and how far each lies from the one before, 4 bits; a
step wider than 15 is cut by zeros. Against a bit mask the gaps cost 4 bits a kept weight instead
of 1 bit a weight: less above 75 % sparsity, 20 % of a bit more at 70 %; and work grows with the
kept weights, where a bit mask is walked bit by bit.

Shapes: O = rows, I = columns, R = 32 rows of a tile, T = ceil(O / R) tiles, S = segments that each
row is cut into, C = chunks of all tiles; a chunk holds 8 weights of every segment and row.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, unknown

__all__ = ["KINDS", "Kind", "Tiled", "is_two_four", "tile"]

Kind = Literal["2:4", "gaps"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DTYPES = (torch.bfloat16, torch.float16)
ROWS = 32
CHUNK = 8
_WIDEST = 15  # columns that one step advances
_PIECE = 1 << 23  # weights looked at together while packing


@dataclass(frozen=True, eq=False)
class Tiled:
    """A matrix in the order in which a GPU reads it; made by :func:`tile`.

    Parameters
    ----------
    values : (C, S, R, 8), bfloat16 or float16; lines and ends of rows are filled with zeros.
    codes : ``gaps``: int32, (C, S, R), eight steps of 4 bits, lowest first, 0 for the first
        weight of a segment; ``2:4``: int16, eight places of 2 bits.
    start : int32, (T, S, R), the column where a segment begins.
    first : int32, (T + 1,), the first chunk of every tile.
    order : int32, (T R,), the row that each line of the tiles holds, −1 for none.
    shape : (O, I).
    kind : ``2:4`` or ``gaps``.
    """

    values: Tensor
    codes: Tensor
    start: Tensor
    first: Tensor
    order: Tensor
    shape: tuple[int, int]
    kind: Kind

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All of them, in the order of the fields."""
        return self.values, self.codes, self.start, self.first, self.order

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored weights."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes stored, which are the bytes of the matrix that a product reads."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def columns(self) -> Tensor:
        """int64, (C, S, R, 8): the column of every stored value, fillings included."""
        chunks = self.first.diff().long()
        tiles = torch.arange(len(chunks), device=chunks.device).repeat_interleave(chunks)
        begin = self.start.long()[tiles]
        shifts = torch.arange(CHUNK, device=chunks.device) * (2 if self.kind == "2:4" else 4)
        codes = (self.codes.long()[..., None] >> shifts) & (3 if self.kind == "2:4" else 15)
        at = torch.arange(len(tiles), device=chunks.device) - self.first.long()[tiles]
        if self.kind == "2:4":
            group = torch.arange(CHUNK, device=chunks.device) // 2 * 4
            return begin[..., None] + (16 * at)[:, None, None, None] + group + codes
        # Sums over all chunks, less what the tile's first chunk had before it.
        steps = codes.sum(3)
        before = steps.cumsum(0) - steps
        base = before[self.first.long()[:-1].clamp(max=max(0, len(steps) - 1))]
        return (begin + before - base[tiles])[..., None] + codes.cumsum(3)

    def to_dense(self) -> Tensor:
        """The (O, I) matrix in the dtype of the values, every weight but zeros bit for bit."""
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.values.device)
        if not self.values.numel():
            return dense
        chunks = self.first.diff().long()
        tiles = torch.arange(len(chunks), device=chunks.device).repeat_interleave(chunks)
        row = self.order.long().view(-1, 1, ROWS)[tiles][..., None].expand_as(self.values)
        kept = self.values != 0
        dense[row[kept], self.columns()[kept]] = self.values[kept]
        return dense

    def __repr__(self) -> str:
        size = f"{self.shape[0]}x{self.shape[1]}"
        name = str(self.dtype).removeprefix("torch.")
        return f"Tiled({size}, {self.kind}, {name}, {self.nbytes:,} bytes)"


def is_two_four(weight: Tensor) -> bool:
    """Whether every four columns hold at most two weights, and rows are whole chunks."""
    if weight.dim() != 2 or weight.shape[1] % 16 or not weight.numel():
        return False
    return bool(((weight != 0).view(-1, 4).sum(1) <= 2).all())


def tile(
    weight: Tensor,
    kind: Kind,
    dtype: torch.dtype | None = None,
    segments: int | None = None,
) -> Tiled:
    """Store a pruned matrix for GPUs, on the device it is on.

    Parameters
    ----------
    weight : (O, I); what is other than 0 is kept.
    kind : ``2:4`` (I a multiple of 16) or ``gaps``.
    dtype : bfloat16 or float16, rounding if need be; that of the weight when left out.
    segments : parts of a row, a power of two up to 32; by the size of the matrix when left out.

    Raises
    ------
    GossamerError
        For a tensor that is no matrix, another dtype, NaN or infinite weights, more than two
        weights in four, or an odd number of segments.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in DTYPES or weight.dim() != 2:
        raise GossamerError(
            f"tiled weights are matrices of bfloat16 or float16; got {dtype} "
            f"{tuple(weight.shape)}: pass dtype=torch.bfloat16"
        )
    if segments is not None and segments not in (1, 2, 4, 8, 16, 32):
        raise GossamerError(f"segments is {segments}; give a power of two, 1 to 32")
    dense = weight.detach().to(dtype)
    if bad := int((~dense.isfinite()).sum()):
        raise GossamerError(f"{bad} weights are NaN or infinite; repair the matrix first")
    if kind == "2:4":
        if not is_two_four(dense):
            raise GossamerError(
                "2:4 takes at most two weights in every four columns, and a multiple of 16 "
                "columns: use kind gaps"
            )
        return _tile_two_four(dense, segments)
    return _tile_gaps(dense, segments)


def _segments(entries: int) -> int:
    """Parts of a row: as many threads as a program may have, each with a few chunks to itself."""
    parts = 32
    while parts > 4 and entries < 4 * CHUNK * parts:
        parts //= 2
    return parts


def _tile_two_four(dense: Tensor, segments: int | None) -> Tiled:
    rows, columns = dense.shape
    parts = _segments(columns // 2) if segments is None else segments
    tiles, chunks = -(-rows // ROWS), -(-columns // (16 * parts))
    groups = (dense != 0).view(rows, -1, 4)
    # Stable: the kept ones first, then the free ones, both from the lowest place up.
    places = torch.argsort((~groups).to(torch.uint8), dim=2, stable=True)[:, :, :2]
    places = places.sort(dim=2).values
    values = dense.view(rows, -1, 4).gather(2, places)

    def arranged(entries: Tensor) -> Tensor:
        """(O, I / 2) -> (T, chunks, S, R, 8), lines and rows filled up with zeros."""
        flat = entries.reshape(rows, -1)
        missing = (0, 16 * parts * chunks // 2 - flat.shape[1], 0, tiles * ROWS - rows)
        filled = torch.nn.functional.pad(flat, missing)
        return filled.view(tiles, ROWS, parts, chunks, CHUNK).permute(0, 3, 2, 1, 4)

    shifts = 2 * torch.arange(CHUNK, device=dense.device)
    codes = (arranged(places.to(torch.int32)) << shifts).sum(-1).to(torch.int16)
    begin = torch.arange(parts, device=dense.device, dtype=torch.int32) * (16 * chunks)
    number = partial(torch.arange, device=dense.device, dtype=torch.int32)
    order = torch.nn.functional.pad(number(rows), (0, tiles * ROWS - rows), value=-1)
    return Tiled(
        values=arranged(values).reshape(-1, parts, ROWS, CHUNK).contiguous(),
        codes=codes.reshape(-1, parts, ROWS).contiguous(),
        start=begin[None, :, None].expand(tiles, parts, ROWS).contiguous(),
        first=number(tiles + 1) * chunks,
        order=order,
        shape=(rows, columns),
        kind="2:4",
    )


def _fillers(kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and step of every kept weight of (r, I); steps beyond 15 need zeros between.

    The first of a row has step 0: a segment names the column where it begins.
    """
    row, column = kept.nonzero(as_tuple=True)
    first = row.diff(prepend=row[:1] - 1) != 0
    return row, column, column.diff(prepend=column[:1]).masked_fill_(first, 0)


def _tile_gaps(dense: Tensor, segments: int | None) -> Tiled:
    rows, columns = dense.shape
    device = dense.device
    pieces = dense.split(max(1, _PIECE // max(1, columns)))
    counts = torch.zeros(rows, dtype=torch.int64, device=device)
    at = 0
    for piece in pieces:
        row, _, step = _fillers(piece != 0)
        counts[at : at + len(piece)].index_add_(0, row, 1 + (step - 1).clamp_(min=0) // _WIDEST)
        at += len(piece)
    # Rows of equal length beside one another, so that none waits for a longer one.
    sorted_counts, by_count = counts.sort(descending=True, stable=True)
    tiles = -(-rows // ROWS)
    missing = tiles * ROWS - rows
    order = torch.nn.functional.pad(by_count, (0, missing), value=-1)
    longest = torch.nn.functional.pad(sorted_counts, (0, missing)).view(tiles, ROWS).amax(1)
    parts = segments
    if parts is None:
        parts = _segments(int(sorted_counts.float().mean()) if rows else 0)
    chunks = -(-longest // (CHUNK * parts))
    first = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    total = int(first[-1])
    line = torch.empty_like(by_count)
    line[by_count] = torch.arange(rows, device=device)
    values = torch.zeros(total, parts, ROWS, CHUNK, dtype=dense.dtype, device=device)
    steps = torch.zeros(values.shape, dtype=torch.uint8, device=device)
    start = torch.zeros(tiles, parts, ROWS, dtype=torch.int32, device=device)
    before = 0
    for piece in pieces:
        row, column, step = _fillers(piece != 0)
        extra = (step - 1).clamp_(min=0) // _WIDEST
        # Place of an entry in its row, zeros counted: what came before it in the whole piece,
        # less what came before the row.
        place = (extra + 1).cumsum(0) - 1
        ends = counts[before : before + len(piece)].cumsum(0)
        place -= (ends - counts[before : before + len(piece)])[row]
        owner = torch.arange(len(row), device=device).repeat_interleave(extra)
        which = torch.arange(len(owner), device=device)
        which -= (extra.cumsum(0) - extra)[owner]  # 0 for the first zero before a weight
        filled = torch.cat([row, row[owner]]) + before
        spots = torch.cat([place, (place - extra)[owner] + which])
        found = torch.cat([column, (column - step)[owner] + _WIDEST * (which + 1)])
        moves = torch.cat([step - _WIDEST * extra, torch.full_like(which, _WIDEST)])
        number = line[filled]
        own, lane = number // ROWS, number % ROWS
        length = chunks[own] * CHUNK
        part, inner = spots // length, spots % length
        flat = ((first[own] + inner // CHUNK) * parts + part) * ROWS + lane
        flat = flat * CHUNK + inner % CHUNK
        begins = inner == 0
        steps.view(-1)[flat] = moves.masked_fill_(begins, 0).to(torch.uint8)
        values.view(-1)[flat[: len(row)]] = piece[row, column]
        start[own[begins], part[begins], lane[begins]] = found[begins].to(torch.int32)
        before += len(piece)
    codes = torch.zeros(values.shape[:3], dtype=torch.int32, device=device)
    for k in range(CHUNK):
        codes |= steps[..., k].to(torch.int32) << (4 * k)
    return Tiled(
        values=values,
        codes=codes,
        start=start,
        first=first.to(torch.int32),
        order=order.to(torch.int32),
        shape=(rows, columns),
        kind="gaps",
    )
