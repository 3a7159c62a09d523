"""The Triton programs of selection; what they compute is in reference.py.

Shapes: G = key-value heads, R = query heads of one, W = last queries (WP: padded to a power of 2,
also the keys of a tile), S = splits of the keys, D = head width.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl

__all__ = [
    "equal_kernel",
    "join_kernel",
    "last_mass_kernel",
    "last_top_kernel",
    "mark_kernel",
    "mass_kernel",
    "mean_kernel",
]


@triton.jit
def _tile(k_ptr, stride_kn, tile, K, D: tl.constexpr, WP: tl.constexpr, DP: tl.constexpr):
    """Keys of a tile: (WP, DP)."""
    n, d = tile * WP + tl.arange(0, WP), tl.arange(0, DP)
    return tl.load(
        k_ptr + n.to(tl.int64)[:, None] * stride_kn + d[None, :],
        mask=(n < K)[:, None] & (d < D)[None, :],
        other=0.0,
    )


@triton.jit
def _last(q_ptr, stride_qw, W, D: tl.constexpr, WP: tl.constexpr, DP: tl.constexpr):
    """The last queries of a head: (WP, DP)."""
    w, d = tl.arange(0, WP), tl.arange(0, DP)
    return tl.load(
        q_ptr + w[:, None] * stride_qw + d[None, :],
        mask=(w < W)[:, None] & (d < D)[None, :],
        other=0.0,
    )


@triton.jit
def _score(q, k, tile, first, factor, softcap, K, W, WP: tl.constexpr, SOFTCAP: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Scores in base 2, -inf where a key is not seen: (WP, WP)."""
    score = tl.dot(q, k.T, input_precision=PRECISION) * factor
    if SOFTCAP:
        x = score / softcap
        score = softcap * (2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * x)) - 1.0)
    w, n = tl.arange(0, WP), tile * WP + tl.arange(0, WP)
    live = (n[None, :] <= (K - W + w)[:, None]) & (n >= first)[None, :] & (w < W)[:, None]
    return tl.where(live, score, float("-inf"))


@triton.jit(do_not_specialize=["K", "EACH"])
def last_top_kernel(
    q_ptr,
    k_ptr,
    first_ptr,
    stat_ptr,
    factor,
    softcap,
    stride_qb,
    stride_qh,
    stride_qw,
    stride_kb,
    stride_kh,
    stride_kn,
    H,
    K,
    W,
    D: tl.constexpr,
    EACH,
    R: tl.constexpr,
    WP: tl.constexpr,
    DP: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Largest score of every last query within a split of the keys, and the sum over it."""
    split, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // H).to(tl.int64), (row % H).to(tl.int64)
    first = 0
    if HAS_FIRST:
        first = tl.load(first_ptr + b)
    top = tl.full((WP,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((WP,), dtype=tl.float32)
    q = _last(q_ptr + b * stride_qb + h * stride_qh, stride_qw, W, D, WP, DP)
    k_at = k_ptr + b * stride_kb + (h // R) * stride_kh
    tiles = (K + WP - 1) // WP
    for tile in range(split * EACH, tl.minimum((split + 1) * EACH, tiles)):
        k = _tile(k_at, stride_kn, tile, K, D, WP, DP)
        score = _score(q, k, tile, first, factor, softcap, K, W, WP, SOFTCAP, PRECISION)
        new = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(score - new[:, None]), 1)
        top = new
    w = tl.arange(0, WP)
    to = stat_ptr + (row * tl.num_programs(0) + split) * 2 * WP + w
    tl.store(to, top)
    tl.store(to + WP, total)


@triton.jit
def join_kernel(stat_ptr, whole_ptr, S, WP: tl.constexpr, SP: tl.constexpr, N: tl.constexpr):
    """Largest score and reciprocal of the sum of every query, over all splits of one head."""
    row = tl.program_id(0)
    w, s = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, SP)
    at = stat_ptr + (row * S + s)[:, None] * 2 * WP + w[None, :]
    tops = tl.load(at, mask=(s < S)[:, None], other=-1.0e30)
    totals = tl.load(at + WP, mask=(s < S)[:, None], other=0.0)
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp2(tops - top[None, :]), 0)
    to = whole_ptr + row * 2 * WP + w
    tl.store(to, top)
    tl.store(to + WP, 1.0 / tl.where(total > 0, total, 1.0))


@triton.jit(do_not_specialize=["K", "TILES"])
def last_mass_kernel(
    q_ptr,
    k_ptr,
    first_ptr,
    whole_ptr,
    vertical_ptr,
    near_ptr,
    far_ptr,
    factor,
    softcap,
    stride_qb,
    stride_qh,
    stride_qw,
    stride_kb,
    stride_kh,
    stride_kn,
    G,
    K,
    W,
    D: tl.constexpr,
    TILES,
    R: tl.constexpr,
    WP: tl.constexpr,
    DP: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights of one tile of keys, summed over heads, by key and by distance.

    Entry s of ``near`` is the sum over rows i of the weights at key s + i of the tile, as far as
    that lies in it; of ``far``, at key s + i - WP. Added up with the tile before they are whole
    diagonals.
    """
    tile, row = tl.program_id(0), tl.program_id(1)
    b, g = (row // G).to(tl.int64), (row % G).to(tl.int64)
    first = 0
    if HAS_FIRST:
        first = tl.load(first_ptr + b)
    w = tl.arange(0, WP)
    weight = tl.zeros((WP, WP), dtype=tl.float32)
    k = _tile(k_ptr + b * stride_kb + g * stride_kh, stride_kn, tile, K, D, WP, DP)
    for r in range(R):
        h = g * R + r
        whole = whole_ptr + (row * R + r) * 2 * WP + w
        q = _last(q_ptr + b * stride_qb + h * stride_qh, stride_qw, W, D, WP, DP)
        score = _score(q, k, tile, first, factor, softcap, K, W, WP, SOFTCAP, PRECISION)
        weight += tl.exp2(score - tl.load(whole)[:, None]) * tl.load(whole + WP)[:, None]
    weight = weight / (R * W)
    n = tl.arange(0, WP)
    to = (row.to(tl.int64) * TILES + tile) * WP + n
    tl.store(vertical_ptr + to, tl.sum(weight, 0))
    turned = n[None, :] + w[:, None]
    skew = tl.gather(weight, turned % WP, 1)
    tl.store(near_ptr + to, tl.sum(tl.where(turned < WP, skew, 0.0), 0))
    tl.store(far_ptr + to, tl.sum(tl.where(turned < WP, 0.0, skew), 0))


@triton.jit(do_not_specialize=["T", "BLOCKS"])
def mean_kernel(
    x_ptr,
    first_ptr,
    out_ptr,
    stride_b,
    stride_h,
    stride_n,
    H,
    T,
    BLOCKS,
    D: tl.constexpr,
    BLOCK,
    N: tl.constexpr,
    DP: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Mean of the real tokens of one block; with a tail, the last is the last BLOCK tokens."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = row // H
    first = 0
    if HAS_FIRST:
        first = tl.load(first_ptr + b)
    d = tl.arange(0, DP)
    base = x_ptr + b * stride_b + (row % H) * stride_h
    total = tl.zeros((DP,), dtype=tl.float32)
    start = block * BLOCK
    if TAIL:
        start = tl.where(block == BLOCKS - 1, tl.maximum(T - BLOCK, 0), start)
    end = tl.minimum(start + BLOCK, T)
    for at in range(start, end, N):
        n = at + tl.arange(0, N)
        inside = ((n < end) & (n >= first))[:, None] & (d < D)[None, :]
        x = tl.load(base + n.to(tl.int64)[:, None] * stride_n + d[None, :], mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    count = tl.maximum(end - tl.maximum(start, first), 1)
    tl.store(out_ptr + (row * BLOCKS + block) * D + d, total / count, mask=d < D)


@triton.jit
def _found(mass_ptr, target, TURNS: tl.constexpr):
    """Leading bits of the cut after so many turns of four bits, and the mass above it.

    ``mass`` (8, 16) holds, turn by turn, the mass at or above every next digit.
    """
    found = tl.full((), 0, tl.int32)
    above = tl.full((), 0, tl.int64)
    digit = tl.arange(0, 16)
    for turn in tl.static_range(TURNS):
        mass = tl.load(mass_ptr + turn * 16 + digit)
        # Digit 0 is reached by what came before.
        best = tl.sum(((mass >= target) & (digit > 0)).to(tl.int32), 0)
        over = tl.sum(tl.where(digit == best + 1, mass, 0), 0)
        above = tl.where(best < 15, over, above)
        found = found | (best << (28 - 4 * turn))
    return found, above


@triton.jit(do_not_specialize=["SIZE", "EACH", "target"])
def mass_kernel(x_ptr, mass_ptr, SIZE, EACH, target, TURN: tl.constexpr, N: tl.constexpr):
    """One turn of the search: the mass at or above every next digit, of one stretch of a row.

    Masses are whole numbers of 2^-40, so their sums depend on no order. The bits of numbers of
    at least 0 are in their own order.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = mass_ptr + row * 128
    found, _ = _found(own, target, TURN)
    digit = tl.arange(0, 16)
    total = tl.zeros((16,), dtype=tl.int64)
    end = tl.minimum((part + 1) * EACH, SIZE)
    for at in range(part * EACH, end, N):
        n = at + tl.arange(0, N)
        x = tl.load(x_ptr + row * SIZE + n, mask=n < end, other=0.0)
        # How many digits an entry reaches: those up to its own, if what comes before is equal.
        apart = x.to(tl.int32, bitcast=True) - found
        reach = tl.minimum(apart >> (28 - 4 * TURN), 15)
        mass = (x * 1099511627776.0).to(tl.int64)
        total += tl.sum(tl.where(digit[:, None] <= reach[None, :], mass[None, :], 0), 1)
    tl.atomic_add(own + TURN * 16 + digit, total)


@triton.jit(do_not_specialize=["SIZE", "EACH", "target"])
def equal_kernel(x_ptr, mass_ptr, equal_ptr, SIZE, EACH, target, N: tl.constexpr):
    """How many entries of a stretch of a row lie at the cut."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    found, _ = _found(mass_ptr + row * 128, target, 8)
    count = 0
    end = tl.minimum((part + 1) * EACH, SIZE)
    for at in range(part * EACH, end, N):
        n = at + tl.arange(0, N)
        inside = n < end
        x = tl.load(x_ptr + row * SIZE + n, mask=inside, other=0.0)
        count += tl.sum((inside & (x.to(tl.int32, bitcast=True) == found)).to(tl.int32), 0)
    tl.store(equal_ptr + row * tl.num_programs(0) + part, count)


@triton.jit(do_not_specialize=["SIZE", "EACH", "target"])
def mark_kernel(x_ptr, mass_ptr, equal_ptr, kept_ptr, SIZE, EACH, target, N: tl.constexpr,
                PARTS: tl.constexpr):  # fmt: skip
    """Mark what lies above the cut, and the first of what lies at it, until the target is met."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0)
    found, above = _found(mass_ptr + row * 128, target, 8)
    each = (found.to(tl.float32, bitcast=True) * 1099511627776.0).to(tl.int64)
    each = tl.maximum(each, 1)
    spare = tl.maximum((target - above + each - 1) // each, 0)
    # Where all of a row does not reach the target, everything is kept.
    spare = tl.where(found == 0, SIZE, spare)
    p = tl.arange(0, PARTS)
    done = tl.sum(tl.load(equal_ptr + row * parts + p, mask=p < part, other=0), 0).to(tl.int64)
    end = tl.minimum((part + 1) * EACH, SIZE)
    for at in range(part * EACH, end, N):
        n = at + tl.arange(0, N)
        inside = n < end
        bits = tl.load(x_ptr + row * SIZE + n, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        equal = inside & (bits == found)
        rank = done + tl.cumsum(equal.to(tl.int32), 0) - 1
        kept = (bits > found) | (equal & (rank < spare))
        tl.store(kept_ptr + row * SIZE + n, kept.to(tl.int8), mask=inside)
        done += tl.sum(equal.to(tl.int32), 0)
