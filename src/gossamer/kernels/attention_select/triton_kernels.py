"""The Triton programs of selection; what they compute is in reference.py.

Shapes: G = key-value heads, R = query heads of one, W = last queries (WP: padded to a power of 2,
also the keys of a tile), S = splits of the keys, D = head width.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl

__all__ = ["cut_kernel", "last_mass_kernel", "last_top_kernel", "mean_kernel"]


@triton.jit
def _tile(q_ptr, k_ptr, stride_qw, stride_kn, tile, first, factor, softcap, K, W, D: tl.constexpr,
          WP: tl.constexpr, DP: tl.constexpr, SOFTCAP: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """Scores in base 2 of the last queries of one head for one tile of keys: (WP, WP)."""
    w, d = tl.arange(0, WP), tl.arange(0, DP)
    n = tile * WP + tl.arange(0, WP)
    q = tl.load(
        q_ptr + w[:, None] * stride_qw + d[None, :],
        mask=(w < W)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    k = tl.load(
        k_ptr + n.to(tl.int64)[:, None] * stride_kn + d[None, :],
        mask=(n < K)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    score = tl.dot(q, k.T, input_precision=PRECISION) * factor
    if SOFTCAP:
        x = score / softcap
        score = softcap * (2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * x)) - 1.0)
    position = K - W + w
    live = (n[None, :] <= position[:, None]) & (n >= first)[None, :] & (w < W)[:, None]
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
    q_at = q_ptr + b * stride_qb + h * stride_qh
    k_at = k_ptr + b * stride_kb + (h // R) * stride_kh
    tiles = (K + WP - 1) // WP
    for tile in range(split * EACH, tl.minimum((split + 1) * EACH, tiles)):
        score = _tile(q_at, k_at, stride_qw, stride_kn, tile, first, factor, softcap, K, W, D,
                      WP, DP, SOFTCAP, PRECISION)  # fmt: skip
        new = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(score - new[:, None]), 1)
        top = new
    w = tl.arange(0, WP)
    to = stat_ptr + (row * tl.num_programs(0) + split) * 2 * WP + w
    tl.store(to, top)
    tl.store(to + WP, total)


@triton.jit(do_not_specialize=["K", "S", "TILES"])
def last_mass_kernel(
    q_ptr,
    k_ptr,
    first_ptr,
    stat_ptr,
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
    S,
    TILES,
    R: tl.constexpr,
    WP: tl.constexpr,
    SP: tl.constexpr,
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
    w, s = tl.arange(0, WP), tl.arange(0, SP)
    weight = tl.zeros((WP, WP), dtype=tl.float32)
    k_at = k_ptr + b * stride_kb + g * stride_kh
    for r in range(R):
        h = g * R + r
        stat = stat_ptr + ((row * R + r) * S + s)[:, None] * 2 * WP + w[None, :]
        tops = tl.load(stat, mask=(s < S)[:, None], other=-1.0e30)
        totals = tl.load(stat + WP, mask=(s < S)[:, None], other=0.0)
        top = tl.max(tops, 0)
        total = tl.sum(totals * tl.exp2(tops - top[None, :]), 0)
        score = _tile(q_ptr + b * stride_qb + h * stride_qh, k_at, stride_qw, stride_kn, tile,
                      first, factor, softcap, K, W, D, WP, DP, SOFTCAP, PRECISION)  # fmt: skip
        share = 1.0 / tl.where(total > 0, total, 1.0)
        weight += tl.exp2(score - top[:, None]) * share[:, None]
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
):
    """Mean of the real tokens of one block."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = row // H
    first = 0
    if HAS_FIRST:
        first = tl.load(first_ptr + b)
    d = tl.arange(0, DP)
    base = x_ptr + b * stride_b + (row % H) * stride_h
    total = tl.zeros((DP,), dtype=tl.float32)
    end = tl.minimum(block * BLOCK + BLOCK, T)
    for at in range(block * BLOCK, end, N):
        n = at + tl.arange(0, N)
        inside = ((n < end) & (n >= first))[:, None] & (d < D)[None, :]
        x = tl.load(base + n.to(tl.int64)[:, None] * stride_n + d[None, :], mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    count = tl.maximum(end - tl.maximum(block * BLOCK, first), 1)
    tl.store(out_ptr + (row * BLOCKS + block) * D + d, total / count, mask=d < D)


@triton.jit(do_not_specialize=["SIZE"])
def cut_kernel(x_ptr, kept_ptr, SIZE, target, N: tl.constexpr):
    """Mark the fewest of a row's largest entries that reach the target, earlier ones of equals.

    Masses are whole numbers of 2^-40, so their sums depend on no order. The bits of numbers of
    at least 0 are in their own order: the cut is found two bits a turn.
    """
    row = tl.program_id(0).to(tl.int64)
    base = x_ptr + row * SIZE
    found = tl.full((), 0, tl.int32)
    for turn in tl.static_range(16):
        # The sign bit is never set: the first turn has one bit.
        one = found | (1 << (30 - 2 * turn))
        two = found | (2 << (30 - 2 * turn)) if turn > 0 else 2147483647
        three = found | (3 << (30 - 2 * turn)) if turn > 0 else 2147483647
        m1 = tl.zeros((N,), dtype=tl.int64)
        m2 = tl.zeros((N,), dtype=tl.int64)
        m3 = tl.zeros((N,), dtype=tl.int64)
        for at in range(0, SIZE, N):
            n = at + tl.arange(0, N)
            x = tl.load(base + n, mask=n < SIZE, other=0.0)
            bits = x.to(tl.int32, bitcast=True)
            mass = (x * 1099511627776.0).to(tl.int64)
            m1 += tl.where(bits >= one, mass, 0)
            m2 += tl.where(bits >= two, mass, 0)
            m3 += tl.where(bits >= three, mass, 0)
        digit = (
            (tl.sum(m1, 0) >= target).to(tl.int32)
            + (tl.sum(m2, 0) >= target).to(tl.int32)
            + (tl.sum(m3, 0) >= target).to(tl.int32)
        )
        found = found | (digit << (30 - 2 * turn))
    above = tl.zeros((N,), dtype=tl.int64)
    for at in range(0, SIZE, N):
        n = at + tl.arange(0, N)
        x = tl.load(base + n, mask=n < SIZE, other=0.0)
        mass = (x * 1099511627776.0).to(tl.int64)
        above += tl.where(x.to(tl.int32, bitcast=True) > found, mass, 0)
    each = tl.maximum((found.to(tl.float32, bitcast=True) * 1099511627776.0).to(tl.int64), 1)
    spare = tl.maximum((target - tl.sum(above, 0) + each - 1) // each, 0)
    # Where all of a row does not reach the target, everything is kept.
    spare = tl.where(found == 0, SIZE, spare)
    done = tl.full((), 0, tl.int64)
    for at in range(0, SIZE, N):
        n = at + tl.arange(0, N)
        inside = n < SIZE
        bits = tl.load(base + n, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        equal = inside & (bits == found)
        rank = done + tl.cumsum(equal.to(tl.int32), 0) - 1
        kept = (bits > found) | (equal & (rank < spare))
        tl.store(kept_ptr + row * SIZE + n, kept.to(tl.int8), mask=inside)
        done += tl.sum(equal.to(tl.int32), 0)
