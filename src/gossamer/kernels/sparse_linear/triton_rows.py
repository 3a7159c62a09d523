"""Products of sparse matrices in Triton: a thread walks along one segment of one row.

Neighbouring threads hold neighbouring rows, so at every step they read weights that lie side by
side and inputs of nearly the same columns, which are in the first cache. Work grows with the kept
weights only.

Shapes: a program takes R rows, each cut into S segments of chunks of 8 weights; N = S R threads.
I = columns, O = rows, B = inputs, a power of two.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl

__all__ = ["rows_kernel"]


@triton.jit
def _low(bits, HALF: tl.constexpr):
    """The lower 16 bits of an integer as a float."""
    if HALF:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:  # noqa: RET505 - Triton leaves a branch out only where both are branches.
        return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(bits, HALF: tl.constexpr):
    """The upper 16 bits of an integer as a float."""
    if HALF:
        return (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:  # noqa: RET505
        return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _inputs(x, column, B: tl.constexpr):
    """What lies at a column: (N,) of one input, (N, B) of several."""
    if B == 1:
        return tl.load(x + column).to(tl.float32)
    else:  # noqa: RET505
        return tl.load(x + column[:, None] * B + tl.arange(0, B)[None, :]).to(tl.float32)


@triton.jit
def _two(
    total,
    column,
    weight,
    codes,
    x,
    pair: tl.constexpr,
    GROUPED: tl.constexpr,
    HALF: tl.constexpr,
    B: tl.constexpr,
):
    """Add two weights times the inputs they meet; return the sum and where the second lies."""
    low, high = _low(weight, HALF), _high(weight, HALF)
    if B > 1:
        low, high = low[:, None], high[:, None]
    if GROUPED:
        first = column + ((codes >> (4 * pair)) & 3) + 4 * pair
        column_of_second = column + ((codes >> (4 * pair + 2)) & 3) + 4 * pair
    else:
        first = column + ((codes >> (8 * pair)) & 15)
        column_of_second = first + ((codes >> (8 * pair + 4)) & 15)
    total += low * _inputs(x, first, B)
    total += high * _inputs(x, column_of_second, B)
    return total, column_of_second


@triton.jit
def _chunk(values, codes, chunk, end, lane, four, N: tl.constexpr):
    """Eight weights of every thread, as four integers, and the codes of their columns."""
    at = chunk.to(tl.int64) * N
    known = chunk + lane * 0 < end
    code = tl.load(codes + at + lane, mask=known, other=0, eviction_policy="evict_first")
    weight = tl.load(
        values + at * 4 + lane[:, None] * 4 + four[None, :],
        mask=known[:, None],
        other=0,
        eviction_policy="evict_first",
    )
    return code.to(tl.int32), weight


@triton.jit
def rows_kernel(
    x,  # (I, B)
    values,  # int32 (chunks of all tiles, S, R, 4): two weights each
    codes,  # (chunks, S, R): int32, eight gaps of 4 bits; grouped: int16, eight places of 2 bits
    start,  # int32 (tiles, S, R): column of a segment's first weight, or its first group's
    first,  # int32 (tiles + 1,): the tile's first chunk
    order,  # int32 (tiles R,): the row that a line of the tile holds, -1 for none
    y,  # (batch, O)
    batch,
    rows,
    last,  # grouped: the last column that a chunk may begin at
    GROUPED: tl.constexpr,
    HALF: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    U: tl.constexpr,
):
    """y = x Wᵀ for the rows of one tile; sums are float32 and in one order."""
    tile = tl.program_id(0)
    N: tl.constexpr = S * R
    lane = tl.arange(0, N)
    four = tl.arange(0, 4)
    begin, end = tl.load(first + tile), tl.load(first + tile + 1)
    column = tl.load(start + tile * N + lane)
    if B == 1:  # noqa: SIM108 - Triton needs branches.
        total = tl.zeros((N,), tl.float32)
    else:
        total = tl.zeros((N, B), tl.float32)
    next_code, next_weight = _chunk(values, codes, begin, end, lane, four, N)
    for done in tl.range(0, end - begin, loop_unroll_factor=U):
        # The next chunk is on its way while this one is worked on.
        code, weight = next_code, next_weight
        next_code, next_weight = _chunk(values, codes, begin + 1 + done, end, lane, four, N)
        even, odd = tl.split(tl.reshape(weight, (N, 2, 2)))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        if GROUPED:
            base = tl.minimum(column, last)
            total, _0 = _two(total, base, w0, code, x, 0, GROUPED, HALF, B)
            total, _1 = _two(total, base, w1, code, x, 1, GROUPED, HALF, B)
            total, _2 = _two(total, base, w2, code, x, 2, GROUPED, HALF, B)
            total, _3 = _two(total, base, w3, code, x, 3, GROUPED, HALF, B)
            column += 16
        else:
            total, column = _two(total, column, w0, code, x, 0, GROUPED, HALF, B)
            total, column = _two(total, column, w1, code, x, 1, GROUPED, HALF, B)
            total, column = _two(total, column, w2, code, x, 2, GROUPED, HALF, B)
            total, column = _two(total, column, w3, code, x, 3, GROUPED, HALF, B)
    b = tl.arange(0, B)
    result = tl.trans(tl.sum(tl.reshape(total, (S, R, B)), axis=0))
    row = tl.load(order + tile * R + tl.arange(0, R))
    tl.store(
        y + b[:, None] * rows + row[None, :],
        result.to(y.dtype.element_ty),
        mask=(b < batch)[:, None] & (row >= 0)[None, :],
    )
