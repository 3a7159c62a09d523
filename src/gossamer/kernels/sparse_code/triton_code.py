"""Sums of few atoms and their gradients in Triton.

Everything is read in whole rows; sums are float32 and in one order, so results repeat to the bit.
Shapes: R = rows, K = entries of a row, D = width, M = atoms, L = entries one program adds up.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl

__all__ = [
    "atom_gradient_kernel",
    "combine_pieces_kernel",
    "decode_kernel",
    "value_gradient_kernel",
]


@triton.jit
def decode_kernel(
    values,  # (R, K)
    indices,  # (R, K), -1 for padding
    atoms,  # (M, D)
    out,  # (R, D)
    K: tl.constexpr,
    D: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r] = sum_k values[r, k] atoms[indices[r, k]]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, UNROLL):
        for more in tl.static_range(UNROLL):
            k = first + more
            at = tl.load(indices + row * K + k, mask=k < K, other=-1).to(tl.int64)
            value = tl.load(values + row * K + k, mask=(k < K) & (at >= 0), other=0.0)
            atom = tl.load(atoms + at * D + column, mask=inside & (at >= 0), other=0.0)
            total += value.to(tl.float32) * atom.to(tl.float32)
    tl.store(out + row * D + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def value_gradient_kernel(
    rows,  # (R, D)
    indices,  # (R, K), -1 for padding
    atoms,  # (M, D)
    out,  # (R, K)
    K: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[r, k] = rows[r] . atoms[indices[r, k]]; 0 for padding."""
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, K, TILE):
        k = first + tl.arange(0, TILE)
        at = tl.load(indices + row * K + k, mask=k < K, other=-1).to(tl.int64)
        total = tl.zeros((TILE,), tl.float32)
        for start in range(0, D, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(rows + row * D + column, mask=column < D, other=0.0).to(tl.float32)
            atom = tl.load(
                atoms + at[:, None] * D + column[None, :],
                mask=(at >= 0)[:, None] & (column < D)[None, :],
                other=0.0,
            )
            total += tl.sum(atom.to(tl.float32) * x[None, :], axis=1)
        tl.store(out + row * K + k, total.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def atom_gradient_kernel(
    values,  # (E,): of the entries, in the order of their atoms
    tokens,  # int32 (E,): row of each entry
    start,  # int64 (M + 1,): where an atom's entries begin
    owner,  # int64 (P,): atom of each further piece; M for none
    before,  # int64 (M + 1,): further pieces of the atoms before
    rows,  # (R, D)
    out,  # (M, D)
    pieces,  # float32 (P, D)
    M,
    D: tl.constexpr,
    L: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[m] = sum over the first L entries of atom m of value times row; further pieces apart."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    atom = program
    piece = program * 0
    if program >= M:
        atom = tl.load(owner + program - M)
        if atom >= M:
            return
        piece = program - M - tl.load(before + atom) + 1
    begin = tl.load(start + atom) + piece * L
    end = tl.minimum(begin + L, tl.load(start + atom + 1))
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, UNROLL):
        for more in tl.static_range(UNROLL):
            entry = first + more
            token = tl.load(tokens + entry, mask=entry < end, other=0).to(tl.int64)
            value = tl.load(values + entry, mask=entry < end, other=0.0).to(tl.float32)
            x = tl.load(rows + token * D + column, mask=inside & (entry < end), other=0.0)
            total += value * x.to(tl.float32)
    if program >= M:
        tl.store(pieces + (program - M) * D + column, total, mask=inside)
    else:
        tl.store(out + atom * D + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_pieces_kernel(
    owner,  # int64 (P,)
    before,  # int64 (M + 1,)
    pieces,  # float32 (P, D)
    out,  # (M, D)
    M,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to out[m] its further pieces, in order; the program of an atom's first one does it."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    atom = tl.load(owner + piece)
    if atom >= M:
        return
    if tl.load(before + atom) != piece:
        return
    total = tl.load(out + atom * D + column, mask=inside, other=0.0).to(tl.float32)
    for other in range(piece, tl.load(before + atom + 1)):
        total += tl.load(pieces + other * D + column, mask=inside, other=0.0)
    tl.store(out + atom * D + column, total.to(out.dtype.element_ty), mask=inside)
