"""The Triton programs of paged decoding; what they compute is in reference.py.

The query heads that share keys are rows of one tile, so keys are read once. The pages of a row are
split over programs; a second pass adds up the parts, in order, so results never change. Where
pages are to be chosen, one program a row finds its best pages and lists them.
Shapes: G = key-value heads, R = query heads of one, S = splits, N = keys (or pages) of a tile,
D, E = head widths of queries and values.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["bounds_kernel", "choose_kernel", "decode_kernel", "merge_kernel", "score_kernel"]


@triton.jit(do_not_specialize=["PAGES"])
def bounds_kernel(
    k_ptr,
    first_ptr,
    second_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    G,
    PAGES,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    MINMAX: tl.constexpr,
):
    """Least and greatest of every channel of N whole pages, or mean and standard deviation."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tile * N * PAGE + tl.arange(0, N * PAGE)
    d = tl.arange(0, DP)
    inside = (n < PAGES * PAGE)[:, None] & (d < D)[None, :]
    base = k_ptr + (row // G) * stride_kb + (row % G) * stride_kh
    k = tl.load(base + n.to(tl.int64)[:, None] * stride_kn + d[None, :], mask=inside, other=0.0)
    k = tl.reshape(k, (N, PAGE, DP))
    if MINMAX:
        one, two = tl.min(k, 1), tl.max(k, 1)
    else:
        wide = k.to(tl.float32)
        one = tl.sum(wide, 1) / PAGE
        apart = wide - one[:, None, :]
        two = tl.sqrt(tl.sum(apart * apart, 1) / PAGE)
    p = tile * N + tl.arange(0, N)
    to = (row * PAGES + p)[:, None] * D + d[None, :]
    mask = (p < PAGES)[:, None] & (d < D)[None, :]
    tl.store(first_ptr + to, one.to(first_ptr.dtype.element_ty), mask=mask)
    tl.store(second_ptr + to, two.to(second_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["PAGES"])
def score_kernel(
    q_ptr,
    first_ptr,
    second_ptr,
    score_ptr,
    stride_qb,
    stride_qh,
    stride_fb,
    stride_fh,
    stride_fn,
    stride_sb,
    stride_sh,
    stride_sn,
    G,
    PAGES,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    MINMAX: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Estimates of N pages, summed over the R heads."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    b, g = row // G, row % G
    d, p = tl.arange(0, DP), tile * N + tl.arange(0, N)
    inside = (p < PAGES)[:, None] & (d < D)[None, :]
    at = p.to(tl.int64)[:, None]
    one = tl.load(
        first_ptr + b * stride_fb + g * stride_fh + at * stride_fn + d[None, :],
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    two = tl.load(
        second_ptr + b * stride_sb + g * stride_sh + at * stride_sn + d[None, :],
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    q_at = q_ptr + b * stride_qb + g * R * stride_qh + d
    # sum_c max(q_c low_c, q_c high_c) = q+ . high + q- . low: heads are summed before.
    up = tl.zeros((DP,), dtype=tl.float32)
    down = tl.zeros((DP,), dtype=tl.float32)
    score = tl.zeros((N,), dtype=tl.float32)
    for r in tl.static_range(R):
        q = tl.load(q_at + r * stride_qh, mask=d < D, other=0.0).to(tl.float32)
        if MINMAX:
            up += tl.maximum(q, 0.0)
            down += tl.minimum(q, 0.0)
        else:
            up += q
            along = q[None, :] * two
            score += tl.sqrt(tl.sum(along * along, 1))
    if MINMAX:
        score = tl.sum(two * up[None, :] + one * down[None, :], 1)
    else:
        score += tl.sum(one * up[None, :], 1)
    tl.store(score_ptr + row * PAGES + p, score, mask=p < PAGES)


@triton.jit(do_not_specialize=["PAGES", "KEEP"])
def choose_kernel(
    score_ptr,
    list_ptr,
    PAGES,
    KEEP,
    PP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The KEEP best pages of a row in the order of their places, page PAGES always the last.

    Pages before it have scores. Of equal scores the earlier pages are taken.
    """
    row = tl.program_id(0).to(tl.int64)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.arange(0, PP)
    there = n < PAGES
    wanted = KEEP - 1
    bits = tl.load(score_ptr + row * PAGES + n, mask=there, other=0.0).to(tl.int32, bitcast=True)
    # As unsigned numbers in the order of the scores; 0 is below every score but NaN's.
    bits = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    number = tl.where(there, tl.maximum(bits.to(tl.uint32, bitcast=True), 1), 0).to(tl.uint32)
    # All scores begin with the bits that the greatest and the least of them share.
    most = tl.max(number.to(tl.int64), 0)
    least = tl.min(tl.where(there, number.to(tl.int64), most), 0)
    length = ((most ^ least) | 1).to(tl.float32).to(tl.int32, bitcast=True)
    shift = tl.minimum(((length >> 23) - 127) & -2, 30)
    found = ((most >> shift >> 2) << 2 << shift).to(tl.uint32)
    # The least prefix that so many scores reach, two bits a turn: three counts in one sum.
    reached = PAGES
    while (shift >= 0) & (reached != wanted):
        one = (number >= (found + (1 << shift).to(tl.uint32))).to(tl.int64)
        two = (number >= (found + (2 << shift).to(tl.uint32))).to(tl.int64)
        three = (number >= (found + (3 << shift).to(tl.uint32))).to(tl.int64)
        count = tl.sum(one + (two << 20) + (three << 40), 0)
        first = (count & 0xFFFFF).to(tl.int32)
        second = ((count >> 20) & 0xFFFFF).to(tl.int32)
        third = (count >> 40).to(tl.int32)
        digit = (first >= wanted).to(tl.int32)
        digit += (second >= wanted).to(tl.int32) + (third >= wanted).to(tl.int32)
        reached = tl.where(digit == 1, first, tl.where(digit == 2, second, reached))
        reached = tl.where(digit == 3, third, reached)
        found = found + (digit << shift).to(tl.uint32)
        shift -= 2
    # Of those that only just reach it, as many as there is room for.
    above = ((number > found) & there & (wanted > 0)).to(tl.int32)
    equal = ((number == found) & there & (wanted > 0)).to(tl.int32)
    spare = wanted - tl.sum(above, 0)
    both = tl.cumsum(above + (equal << 16), 0)
    same = (both >> 16) - equal
    rank = (both & 0xFFFF) - above + tl.minimum(same, spare)
    mine = (above > 0) | ((equal > 0) & (same < spare))
    tl.store(list_ptr + row * KEEP + rank, n, mask=mine)
    tl.store(list_ptr + row * KEEP + wanted, PAGES)


@triton.jit(do_not_specialize=["END", "KEEP"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    indptr_ptr,
    indices_ptr,
    first_ptr,
    part_ptr,
    stat_ptr,
    factor,
    softcap,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ib,
    stride_ih,
    G,
    END,
    KEEP,
    D: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    PAGE: tl.constexpr,
    N: tl.constexpr,
    CHOSEN: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One split of the pages of one key-value head: part of the sum, its largest score and total.

    KEEP pages a row, one row's after another's, where they were chosen.
    """
    split, row = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    b, g = (row // G).to(tl.int64), (row % G).to(tl.int64)
    if CHOSEN:
        begin = row * KEEP
        end = begin + KEEP
    else:
        at = indptr_ptr + b * stride_ib + g * stride_ih
        begin, end = tl.load(at).to(tl.int32), tl.load(at + 1).to(tl.int32)
    each = (end - begin + splits - 1) // splits
    low = tl.minimum(begin + split * each, end)
    count = tl.minimum(low + each, end) - low
    pages = indices_ptr + low
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
    acc = tl.zeros((RP, EP), dtype=tl.float32)
    top = tl.full((RP,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((RP,), dtype=tl.float32)
    for t in range(0, count * PAGE, N):
        n = t + tl.arange(0, N)
        page = tl.load(pages + n // PAGE, mask=n < count * PAGE, other=0)
        key = page * PAGE + n % PAGE
        live = (n < count * PAGE) & (key < END)
        if HAS_FIRST:
            live = live & (key >= first)
        wide = key.to(tl.int64)[:, None]
        k = tl.load(
            k_at + wide * stride_kn + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0
        )
        v = tl.load(
            v_at + wide * stride_vn + e[None, :], mask=live[:, None] & (e < E)[None, :], other=0.0
        )
        score = tl.dot(q, k.T, input_precision=PRECISION) * factor
        if SOFTCAP:
            x = score / softcap
            score = softcap * (2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * x)) - 1.0)
        score = tl.where(live[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new
    to = (row * splits + split).to(tl.int64) * R + r
    tl.store(part_ptr + to[:, None] * E + e[None, :], acc, mask=(r < R)[:, None] & (e < E)[None, :])
    tl.store(stat_ptr + to * 2, top, mask=r < R)
    tl.store(stat_ptr + to * 2 + 1, total, mask=r < R)


@triton.jit
def merge_kernel(
    part_ptr,
    stat_ptr,
    sink_ptr,
    out_ptr,
    S,
    E: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    SP: tl.constexpr,
    EP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The parts of one query head, weighted by their largest scores."""
    head = tl.program_id(0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, r = head // R, head % R
    s, e = tl.arange(0, SP), tl.arange(0, EP)
    at = (row * S + s).to(tl.int64) * R + r
    top = tl.load(stat_ptr + at * 2, mask=s < S, other=-1.0e30)
    total = tl.load(stat_ptr + at * 2 + 1, mask=s < S, other=0.0)
    most = tl.max(top, 0)
    if HAS_SINK:
        sink = tl.load(sink_ptr + (row % G) * R + r) * 1.4426950408889634
        most = tl.maximum(most, sink)
    weight = tl.exp2(top - most)
    whole = tl.sum(weight * total, 0)
    if HAS_SINK:
        whole += tl.exp2(sink - most)
    part = tl.load(
        part_ptr + at[:, None] * E + e[None, :], mask=(s < S)[:, None] & (e < E)[None, :], other=0.0
    )
    out = tl.sum(part * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out_ptr + head * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)
