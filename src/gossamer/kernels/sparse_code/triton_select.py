"""The k largest entries of long rows in Triton: counting bits of keys, never sorting.

Every float becomes an unsigned key of the same order. The k-th largest key is built from its
highest bit down: one count a bit. Long rows are first cut into chunks; the k best entries lie in
the k chunks with the largest maxima (ties to the lower chunk), so only those are read again.
Shapes: R = rows, M = columns, C = chunks of a row, K = entries kept.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl

__all__ = ["chunk_max_kernel", "select_kernel"]


@triton.jit
def _key(x, BITS: tl.constexpr):
    """An unsigned integer of BITS bits that orders as the float does; -0 is 0."""
    bits = (x.to(tl.float32) + 0.0).to(tl.uint32, bitcast=True)
    negative = (bits >> 31) == 1
    key = tl.where(negative, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return key >> (32 - BITS)


@triton.jit
def chunk_max_kernel(
    x,  # (R, M)
    best,  # (R, C)
    M,
    C,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest entry of every chunk."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    value = tl.load(x + row * M + column, mask=column < M, other=float("-inf"))
    tl.store(best + row * C + chunk, tl.max(value, axis=1), mask=chunk < C)


@triton.jit
def select_kernel(
    x,  # (R, M)
    chunks,  # int32 (R, K), rising: which chunks to read; unread without GATHER
    out,  # (R, K), rising: columns of the K largest, ties to the lower column
    M,
    K,
    BITS: tl.constexpr,
    GATHER: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Columns of the K largest of the first WIDE columns, or of the named chunks."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDE)
    if GATHER:
        at = lane // CHUNK
        chunk = tl.load(chunks + row * K + at, mask=at < K, other=0)
        column = chunk * CHUNK + lane % CHUNK
        real = (at < K) & (column < M)
    else:
        column = lane
        real = lane < M
    key = _key(tl.load(x + row * M + column, mask=real, other=float("-inf")), BITS)
    top = tl.zeros((), tl.uint32)
    for down in tl.static_range(BITS):
        tried = top | (1 << (BITS - 1 - down))
        enough = tl.sum((real & (key >= tried)).to(tl.int32), axis=0) >= K
        top = tl.where(enough, tried, top)
    above = real & (key > top)
    equal = real & (key == top)
    room = K - tl.sum(above.to(tl.int32), axis=0)
    kept = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= room))
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(out + row * K + place, column.to(out.dtype.element_ty), mask=kept)
