"""The Triton program of block-sparse attention; what it computes is in reference.py.

A program owns a tile of queries (of one head, or of several heads that share keys, stacked as
rows) and walks the key blocks listed for it: first those every row sees whole, without a mask,
then those that cross the diagonal, the padding or a window, then single columns. Scores are in
base 2 throughout.
Shapes: M = rows of a tile, N = keys of a tile, D, E = head widths of queries and values.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl

__all__ = ["forward_kernel", "plan_kernel"]


@triton.jit
def _keys(source, b, h, at, stride_b, stride_h, stride_n, K, WIDTH, N: tl.constexpr,
          WP: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """N rows of keys or values from row ``at``, zero beyond the last: (N, WP)."""
    if TMA:
        return source.load([b, h, at, 0]).reshape(N, WP)
    else:  # noqa: RET505 - a branch of the compiler
        n, d = at + tl.arange(0, N), tl.arange(0, WP)
        base = source + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        return tl.load(
            base + n.to(tl.int64)[:, None] * stride_n + d[None, :],
            mask=(n < K)[:, None] & (d < WIDTH)[None, :],
            other=0.0,
        )


@triton.jit
def _scores(q, k, factor, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in base 2, but for the factor where there is no softcap: (M, N)."""
    score = tl.dot(q, k.T, input_precision=PRECISION)
    if SOFTCAP:
        x = score * (factor / softcap)
        # tanh, in base 2: the factor of log2(e) is already in ``factor`` and in ``softcap``.
        score = softcap * (2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * x)) - 1.0)
    return score


@triton.jit
def _add(state, score, v, factor, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """The online softmax with one more tile of scores and values."""
    acc, top, total = state
    if SOFTCAP:
        new = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new[:, None])
    else:
        new = tl.maximum(top, tl.max(score, 1) * factor)
        weight = tl.exp2(score * factor - new[:, None])
    shrink = tl.exp2(top - new)
    total = total * shrink + tl.sum(weight, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new, total


@triton.jit(do_not_specialize=["ROWS", "K", "OFFSET", "QUERIES", "WINDOW", "COLUMNS", "BLOCKS"])
def plan_kernel(
    indptr_ptr,
    indices_ptr,
    column_ptr,
    first_ptr,
    seen_ptr,
    bounds_ptr,
    work_ptr,
    stride_ib,
    stride_ih,
    stride_cb,
    stride_ch,
    ROWS,
    K,
    OFFSET,
    QUERIES,
    WINDOW,
    COLUMNS,
    BLOCKS,
    INDEX_HEADS,
    BQ,
    BK,
    N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Where a list begins, is whole from, is whole until, and ends; and tiles of columns.

    Blocks of the list are marked in ``seen``. A block is read without a mask if every query of
    the row sees all of its keys. Columns ascend: tiles beyond the last query are left out.
    """
    item = tl.program_id(0)
    row, listed = item % ROWS, item // ROWS
    b, i = listed // INDEX_HEADS, listed % INDEX_HEADS
    lists = indptr_ptr + b * stride_ib + i * stride_ih + row
    begin, end = tl.load(lists).to(tl.int32), tl.load(lists + 1).to(tl.int32)
    start = OFFSET + row * BQ
    last = OFFSET + tl.minimum(row * BQ + BQ, QUERIES) - 1
    least = tl.minimum(start, K - 1) if CAUSAL else K - 1
    bottom = 0
    if HAS_FIRST:
        bottom = tl.load(first_ptr + b)
    if HAS_WINDOW:
        bottom = tl.maximum(bottom, last + 1 - WINDOW)
    low, high = begin, begin
    for s in range(begin, end, 128):
        n = s + tl.arange(0, 128)
        inside = n < end
        block = tl.load(indices_ptr + n, mask=inside, other=0)
        high += tl.sum((inside & ((block + 1) * BK - 1 <= least)).to(tl.int32), 0)
        low += tl.sum((inside & (block * BK < bottom)).to(tl.int32), 0)
        if HAS_COLUMNS:
            tl.store(seen_ptr + item.to(tl.int64) * BLOCKS + block, 1, mask=inside)
    low = tl.minimum(low, end)
    high = tl.maximum(low, high)
    tiles = 0
    if HAS_COLUMNS:
        reach = last if CAUSAL else K - 1
        count = 0
        for s in range(0, COLUMNS, 128):
            n = s + tl.arange(0, 128)
            of = tl.load(column_ptr + b * stride_cb + i * stride_ch + n, mask=n < COLUMNS, other=-1)
            count += tl.sum(((of >= 0) & (of <= reach)).to(tl.int32), 0)
        tiles = (count + N - 1) // N
    to = bounds_ptr + item * 5
    tl.store(to, begin)
    tl.store(to + 1, low)
    tl.store(to + 2, high)
    tl.store(to + 3, end)
    tl.store(to + 4, tiles)
    tl.store(work_ptr + item, -((end - begin) * (BK // N) + tiles))


@triton.jit(do_not_specialize=["Q", "K", "ROWS", "OFFSET", "WINDOW", "COLUMNS", "BLOCKS"])
def forward_kernel(
    q_source,
    k_source,
    v_source,
    columns_k,
    columns_v,
    out_ptr,
    indices_ptr,
    order_ptr,
    bounds_ptr,
    column_ptr,
    seen_ptr,
    first_ptr,
    sink_ptr,
    factor,
    softcap,
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
    stride_cb,
    stride_ch,
    H,
    Q,
    K,
    ROWS,
    OFFSET,
    WINDOW,
    COLUMNS,
    BLOCKS,
    INDEX_HEADS,
    SHARE,
    REPEAT,
    BQ,
    BK: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    HEADS: tl.constexpr,
    QT: tl.constexpr,
    N: tl.constexpr,
    TMA: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries.

    SHARE query heads read one list, REPEAT query heads one key head; INDEX_HEADS lists a batch
    row. A program takes QT queries of HEADS heads: BQ / QT * SHARE / HEADS programs an item.
    """
    PER: tl.constexpr = BK // N
    M: tl.constexpr = HEADS * QT
    parts = (BQ // QT) * (SHARE // HEADS)
    pid = tl.program_id(0)
    item = tl.load(order_ptr + pid // parts)
    part = pid % parts
    row, list_at = item % ROWS, item // ROWS
    b, i = list_at // INDEX_HEADS, list_at % INDEX_HEADS
    # Heads vary fastest: programs that read the same keys run side by side.
    h = i * SHARE + (part % (SHARE // HEADS)) * HEADS
    g = h // REPEAT
    start = row * BQ + (part // (SHARE // HEADS)) * QT
    r = tl.arange(0, M)
    at = start + r % QT
    position = OFFSET + at
    if TMA:
        q = q_source.load([b, h, start, 0]).reshape(M, DP)
    else:
        d = tl.arange(0, DP)
        q = tl.load(
            q_source
            + b.to(tl.int64) * stride_qb
            + (h + r // QT).to(tl.int64)[:, None] * stride_qh
            + at.to(tl.int64)[:, None] * stride_qn
            + d[None, :],
            mask=(at < Q)[:, None] & (d < D)[None, :],
            other=0.0,
        )
    plan = bounds_ptr + item * 5
    begin, low, high = tl.load(plan), tl.load(plan + 1), tl.load(plan + 2)
    end = tl.load(plan + 3)
    if HAS_FIRST:
        first = tl.load(first_ptr + b)

    acc = tl.zeros((M, EP), dtype=tl.float32)
    if HAS_SINK:
        top = tl.load(sink_ptr + h + r // QT) * 1.4426950408889634
        total = tl.full((M,), 1.0, dtype=tl.float32)
    else:
        # A finite floor keeps rows that see nothing free of NaN.
        top = tl.full((M,), -1.0e30, dtype=tl.float32)
        total = tl.zeros((M,), dtype=tl.float32)

    for t in range(low * PER, high * PER):
        key = tl.load(indices_ptr + t // PER) * BK + (t % PER) * N
        k = _keys(k_source, b, g, key, stride_kb, stride_kh, stride_kn, K, D, N, DP, TMA)
        score = _scores(q, k, factor, softcap, SOFTCAP, PRECISION)
        v = _keys(v_source, b, g, key, stride_vb, stride_vh, stride_vn, K, E, N, EP, TMA)
        acc, top, total = _add((acc, top, total), score, v, factor, SOFTCAP, PRECISION)

    masked = (low - begin) + (end - high)
    for t in range(masked * PER):
        n = begin + t // PER
        n = tl.where(n < low, n, n + high - low)
        key = tl.load(indices_ptr + n) * BK + (t % PER) * N
        k = _keys(k_source, b, g, key, stride_kb, stride_kh, stride_kn, K, D, N, DP, TMA)
        score = _scores(q, k, factor, softcap, SOFTCAP, PRECISION)
        of = (key + tl.arange(0, N))[None, :]
        live = of < K
        if CAUSAL:
            live = live & (of <= position[:, None])
        if HAS_FIRST:
            live = live & (of >= first)
        if HAS_WINDOW:
            live = live & (of > position[:, None] - WINDOW)
        score = tl.where(live, score, float("-inf"))
        v = _keys(v_source, b, g, key, stride_vb, stride_vh, stride_vn, K, E, N, EP, TMA)
        acc, top, total = _add((acc, top, total), score, v, factor, SOFTCAP, PRECISION)

    if HAS_COLUMNS:
        own = column_ptr + b * stride_cb + i * stride_ch
        covered = seen_ptr + item.to(tl.int64) * BLOCKS
        for t in range(tl.load(plan + 4)):
            n = t * N + tl.arange(0, N)
            of = tl.load(own + n, mask=n < COLUMNS, other=-1)
            live = (of >= 0) & (of < K)
            live = live & (tl.load(covered + of // BK, mask=live, other=1) == 0)
            if HAS_FIRST:
                live = live & (of >= first)
            k = _keys(columns_k, b, i, t * N, COLUMNS * D * INDEX_HEADS, COLUMNS * D, D,
                      COLUMNS, D, N, DP, TMA)  # fmt: skip
            score = _scores(q, k, factor, softcap, SOFTCAP, PRECISION)
            seen = live[None, :]
            if CAUSAL:
                seen = seen & (of[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & (of[None, :] > position[:, None] - WINDOW)
            score = tl.where(seen, score, float("-inf"))
            v = _keys(columns_v, b, i, t * N, COLUMNS * E * INDEX_HEADS, COLUMNS * E, E,
                      COLUMNS, E, N, EP, TMA)  # fmt: skip
            acc, top, total = _add((acc, top, total), score, v, factor, SOFTCAP, PRECISION)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    e = tl.arange(0, EP)
    tl.store(
        out_ptr
        + b.to(tl.int64) * stride_ob
        + at.to(tl.int64)[:, None] * stride_on
        + (h + r // QT)[:, None] * stride_oh
        + e[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(at < Q)[:, None] & (e < E)[None, :],
    )
