"""The Triton programs of attention that skips tiles; what they compute is in reference.py.

The scores of every tile are computed; where none comes near the largest so far, the softmax, the
values and their product are left out. The first tile and those on the diagonal are visited first:
they hold the largest scores as a rule, and a tile can only be skipped beside what was seen before.
Shapes: M = queries of a tile, N = keys of a tile, R = query heads that share keys, S = splits,
D, E = head widths of queries and values.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl

from gossamer.kernels.block_attention.triton_kernels import _add, _keys, _scores

__all__ = ["skip_decode_kernel", "skip_kernel"]


@triton.jit(do_not_specialize=["Q", "K", "OFFSET"])
def skip_kernel(
    q_source,
    k_source,
    v_source,
    out_ptr,
    count_ptr,
    first_ptr,
    factor,
    softcap,
    cut,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_on,
    stride_oh,
    H,
    Q,
    K,
    OFFSET,
    REPEAT,
    D: tl.constexpr,
    E: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    TMA: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M queries of one head, the last ones of the prompt first."""
    row = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = row // H, row % H
    g = h // REPEAT
    start = tile * M
    at = start + tl.arange(0, M)
    position = OFFSET + at
    if TMA:
        q = q_source.load([b, h, start, 0]).reshape(M, DP)
    else:
        d = tl.arange(0, DP)
        q = tl.load(
            q_source
            + b.to(tl.int64) * stride_qb
            + h.to(tl.int64) * stride_qh
            + at.to(tl.int64)[:, None] * stride_qn
            + d[None, :],
            mask=(at < Q)[:, None] & (d < D)[None, :],
            other=0.0,
        )
    first = 0
    if HAS_FIRST:
        first = tl.load(first_ptr + b)
    acc = tl.zeros((M, EP), dtype=tl.float32)
    # A finite floor keeps rows that see nothing free of NaN.
    top = tl.full((M,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((M,), dtype=tl.float32)
    skipped = 0
    # Tiles 0 .. whole - 1 lie below the diagonal, those up to ``end`` on it.
    begin = first // N
    whole = tl.maximum((OFFSET + start + 1) // N, begin)
    last = tl.minimum(OFFSET + tl.minimum(start + M, Q), K)
    end = tl.maximum((last + N - 1) // N, whole)
    # The first tile and the diagonal ones; masks apply.
    sink = tl.where(whole > begin, 1, 0)
    for t in range(sink + end - whole):
        key = tl.where(t < sink, begin, whole + t - sink) * N
        k = _keys(k_source, b, g, key, stride_kb, stride_kh, stride_kn, K, D, N, DP, TMA)
        score = _scores(q, k, factor, softcap, SOFTCAP, PRECISION)
        of = (key + tl.arange(0, N))[None, :]
        live = (of < K) & (of <= position[:, None])
        if HAS_FIRST:
            live = live & (of >= first)
        score = tl.where(live, score, float("-inf"))
        v = _keys(v_source, b, g, key, stride_vb, stride_vh, stride_vn, K, E, N, EP, TMA)
        acc, top, total = _add((acc, top, total), score, v, factor, SOFTCAP, PRECISION)
    for t in range(begin + 1, whole):
        key = t * N
        k = _keys(k_source, b, g, key, stride_kb, stride_kh, stride_kn, K, D, N, DP, TMA)
        score = _scores(q, k, factor, softcap, SOFTCAP, PRECISION)
        high = tl.max(score, 1) if SOFTCAP else tl.max(score, 1) * factor
        # Rows beyond the last query have scores of 0: they must not hold a tile.
        apart = tl.where(at < Q, high - top, float("-inf"))
        if tl.max(apart, 0) >= cut:
            v = _keys(v_source, b, g, key, stride_vb, stride_vh, stride_vn, K, E, N, EP, TMA)
            acc, top, total = _add((acc, top, total), score, v, factor, SOFTCAP, PRECISION)
        else:
            skipped += 1
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    e = tl.arange(0, EP)
    tl.store(
        out_ptr
        + b.to(tl.int64) * stride_ob
        + at.to(tl.int64)[:, None] * stride_on
        + h * stride_oh
        + e[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(at < Q)[:, None] & (e < E)[None, :],
    )
    if COUNT:
        to = count_ptr + (row.to(tl.int64) * tl.num_programs(0) + tile) * 2
        tl.store(to, skipped)
        tl.store(to + 1, end - begin)


@triton.jit(do_not_specialize=["K"])
def skip_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    first_ptr,
    part_ptr,
    stat_ptr,
    count_ptr,
    factor,
    softcap,
    cut,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    G,
    K,
    D: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    N: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of the keys for one token; every split first scores the first and last tiles."""
    split, row = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    b, g = (row // G).to(tl.int64), (row % G).to(tl.int64)
    first = 0
    if HAS_FIRST:
        first = tl.load(first_ptr + b)
    r, d, e = tl.arange(0, RP), tl.arange(0, DP), tl.arange(0, EP)
    q = tl.load(
        q_ptr + b * stride_qb + (g * R + r)[:, None] * stride_qh + d[None, :],
        mask=(r < R)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    k_at = k_ptr + b * stride_kb + g * stride_kh
    v_at = v_ptr + b * stride_vb + g * stride_vh
    begin, end = first // N, (K + N - 1) // N
    seen = tl.full((RP,), -1.0e30, dtype=tl.float32)
    for t in range(2):
        n = tl.where(t == 0, begin, end - 1) * N + tl.arange(0, N)
        live = (n < K) & (n >= first)
        inside = live[:, None] & (d < D)[None, :]
        k = tl.load(k_at + n.to(tl.int64)[:, None] * stride_kn + d[None, :], inside, other=0.0)
        score = _scores(q, k, factor, softcap, SOFTCAP, PRECISION)
        score = tl.where(live[None, :], score, float("-inf"))
        high = tl.max(score, 1) if SOFTCAP else tl.max(score, 1) * factor
        seen = tl.maximum(seen, high)
    acc = tl.zeros((RP, EP), dtype=tl.float32)
    top = tl.full((RP,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((RP,), dtype=tl.float32)
    skipped = 0
    each = (end - begin + splits - 1) // splits
    low = begin + split * each
    high_tile = tl.minimum(low + each, end)
    for t in range(low, high_tile):
        n = t * N + tl.arange(0, N)
        live = (n < K) & (n >= first)
        wide = n.to(tl.int64)[:, None]
        k = tl.load(k_at + wide * stride_kn + d[None, :], live[:, None] & (d < D)[None, :], 0.0)
        score = _scores(q, k, factor, softcap, SOFTCAP, PRECISION)
        score = tl.where(live[None, :], score, float("-inf"))
        high = tl.max(score, 1) if SOFTCAP else tl.max(score, 1) * factor
        apart = tl.where(r < R, high - tl.maximum(seen, top), float("-inf"))
        if tl.max(apart, 0) >= cut:
            v = tl.load(v_at + wide * stride_vn + e[None, :], live[:, None] & (e < E)[None, :], 0.0)
            acc, top, total = _add((acc, top, total), score, v, factor, SOFTCAP, PRECISION)
        else:
            skipped += 1
    to = (row * splits + split).to(tl.int64) * R + r
    tl.store(part_ptr + to[:, None] * E + e[None, :], acc, (r < R)[:, None] & (e < E)[None, :])
    tl.store(stat_ptr + to * 2, top, mask=r < R)
    tl.store(stat_ptr + to * 2 + 1, total, mask=r < R)
    at = count_ptr + (row * splits + split) * 2
    tl.store(at, skipped)
    tl.store(at + 1, tl.maximum(high_tile - low, 0))
