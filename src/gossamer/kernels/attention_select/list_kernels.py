"""The Triton programs that turn estimates into block lists; what they compute is in reference.py.

Shapes: R = query heads of a key-value head, n = query blocks, m = key blocks, D = head width.
Flags of diagonals: entry t + 1 of m + 2 stands for blocks of keys t before their queries' own.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl

__all__ = [
    "cover_kernel",
    "cut_kernel",
    "list_kernel",
    "share_kernel",
    "slash_kernel",
    "top_kernel",
]


@triton.jit(do_not_specialize=["K", "LONG", "W"])
def slash_kernel(near_ptr, far_ptr, slash_ptr, K, LONG, W, WP: tl.constexpr, N: tl.constexpr):
    """Whole diagonals from the halves of neighbouring tiles."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o = part * N + tl.arange(0, N)
    x = K - W + WP - o
    inside = o < K
    near = tl.load(
        near_ptr + row * LONG + x - WP, mask=inside & (x >= WP) & (x < LONG + WP), other=0.0
    )
    far = tl.load(far_ptr + row * LONG + x, mask=inside & (x < LONG), other=0.0)
    tl.store(slash_ptr + row * K + o, near + far, mask=inside)


@triton.jit
def _pooled(q_at, live, k_ptr, tile, reach, factor, softcap, m, D: tl.constexpr, DC: tl.constexpr,
            N: tl.constexpr, SOFTCAP: tl.constexpr):  # fmt: skip
    """Scores in base 2 of pooled queries against a tile of pooled keys, -inf where unseen."""
    j, c = tile * N + tl.arange(0, N), tl.arange(0, DC)
    score = (reach[:, None] * 0 + (j * 0)[None, :]).to(tl.float32)
    for start in range(0, D, DC):
        d = start + c
        q = tl.load(q_at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        k_at = k_ptr + j[:, None] * D + d[None, :]
        k = tl.load(k_at, mask=(j < m)[:, None] & (d < D)[None, :], other=0.0)
        score += tl.dot(q, k.T, input_precision="tf32x3")
    score *= factor
    if SOFTCAP:
        x = score / softcap
        score = softcap * (2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * x)) - 1.0)
    return tl.where((j[None, :] <= reach[:, None]) & (j < m)[None, :], score, float("-inf"))


@triton.jit(do_not_specialize=["n", "m", "BASE"])
def share_kernel(
    q_ptr,
    k_ptr,
    share_ptr,
    guess_ptr,
    factor,
    softcap,
    n,
    m,
    BASE,
    D: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    DC: tl.constexpr,
    N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Share of the whole map of every pooled pair, the mean over R heads; row n is the guess."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    f = tl.arange(0, RP * ROWS)
    r, i = f // ROWS, part * ROWS + f % ROWS
    live = (r < R) & (i <= n)
    q_at = q_ptr + ((row * R + r) * (n + 1) + i) * D
    reach = BASE + tl.minimum(i, n - 1)
    last = BASE + tl.minimum(part * ROWS + ROWS - 1, n - 1)
    tiles = tl.minimum(last // N + 1, (m + N - 1) // N)
    own_k = k_ptr + row * m * D
    top = tl.full((RP * ROWS,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((RP * ROWS,), dtype=tl.float32)
    for tile in range(tiles):
        score = _pooled(q_at, live, own_k, tile, reach, factor, softcap, m, D, DC, N, SOFTCAP)
        new = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(score - new[:, None]), 1)
        top = new
    per = tl.where(live, 1.0 / (tl.maximum(total, 1.0e-30) * R), 0.0)
    own, c = part * ROWS + tl.arange(0, ROWS), tl.arange(0, N)
    for tile in range(tiles):
        score = _pooled(q_at, live, own_k, tile, reach, factor, softcap, m, D, DC, N, SOFTCAP)
        weight = tl.exp2(score - top[:, None]) * per[:, None]
        weight = tl.sum(tl.reshape(weight, (RP, ROWS, N)), 0)
        j = tile * N + c
        to = share_ptr + (row * n + own)[:, None] * m + j[None, :]
        tl.store(to, weight / n, mask=(own < n)[:, None] & (j < m)[None, :])
        to = guess_ptr + row * m + j[None, :] + own[:, None] * 0
        tl.store(to, weight, mask=(own == n)[:, None] & (j < m)[None, :])
    none = tl.zeros((ROWS, N), dtype=tl.float32)
    for tile in range(tiles, (m + N - 1) // N):
        j = tile * N + c
        to = share_ptr + (row * n + own)[:, None] * m + j[None, :]
        tl.store(to, none, mask=(own < n)[:, None] & (j < m)[None, :])
        to = guess_ptr + row * m + j[None, :] + own[:, None] * 0
        tl.store(to, none, mask=(own == n)[:, None] & (j < m)[None, :])


@triton.jit
def _entry(x_ptr, at, SIZE, forced, N: tl.constexpr):
    """Entries of a stretch, the first ``forced`` infinite, what lies beyond the end below all."""
    n = at + tl.arange(0, N)
    x = tl.load(x_ptr + n, mask=n < SIZE, other=-1.0)
    return n, tl.where((n < forced) & (n < SIZE), float("inf"), x)


@triton.jit
def _reached(x_ptr, SIZE, forced, one, two, three, N: tl.constexpr, MASS: tl.constexpr):
    """Mass in steps of 2^-40, or number, of the entries whose bits are at least each of three."""
    first = tl.zeros((N,), dtype=tl.int64 if MASS else tl.int32)
    second, third = first, first
    for at in range(0, SIZE, N):
        _, x = _entry(x_ptr, at, SIZE, forced, N)
        bits = x.to(tl.int32, bitcast=True)
        value = (x * 1099511627776.0).to(tl.int64) if MASS else tl.full((N,), 1, dtype=tl.int32)
        first += tl.where(bits >= one, value, 0)
        second += tl.where(bits >= two, value, 0)
        third += tl.where(bits >= three, value, 0)
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)


@triton.jit
def _search(x_ptr, SIZE, forced, target, N: tl.constexpr, MASS: tl.constexpr):
    """Largest bits at or above which the target is reached (0 where nothing does), two by two.

    Returns them, and what lies above them.
    """
    found = tl.full((), 0, tl.int32)
    for turn in range(15):
        step = tl.full((), 1, tl.int32) << (29 - 2 * turn)
        one, two, three = _reached(
            x_ptr, SIZE, forced, found + step, found + 2 * step, found + 3 * step, N, MASS
        )
        digit = (one >= target).to(tl.int32) + (two >= target).to(tl.int32)
        found += step * (digit + (three >= target).to(tl.int32))
    one, two, _ = _reached(x_ptr, SIZE, forced, found + 1, found + 2, found + 2, N, MASS)
    above = tl.where(one >= target, two, one)
    found += (one >= target).to(tl.int32)
    return found, above


@triton.jit
def _equal(x_ptr, SIZE, forced, found, N: tl.constexpr):
    """How many entries have just these bits."""
    count = tl.zeros((N,), dtype=tl.int32)
    for at in range(0, SIZE, N):
        _, x = _entry(x_ptr, at, SIZE, forced, N)
        count += (x.to(tl.int32, bitcast=True) == found).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit(do_not_specialize=["SIZE", "target"])
def cut_kernel(x_ptr, kept_ptr, SIZE, target, N: tl.constexpr):
    """Mark the fewest largest entries of a row that reach a mass, in one program."""
    row = tl.program_id(0).to(tl.int64)
    own = x_ptr + row * SIZE
    found, above = _search(own, SIZE, 0, target, N, True)
    each = (found.to(tl.float32, bitcast=True) * 1099511627776.0).to(tl.int64)
    each = tl.maximum(each, 1)
    spare = tl.maximum((target - above + each - 1) // each, 0)
    # Where all of a row does not reach the target, everything is kept.
    spare = tl.where(found == 0, SIZE, spare)
    ties = _equal(own, SIZE, 0, found, N) > spare
    done = tl.full((), 0, tl.int32)
    for at in range(0, SIZE, N):
        n, x = _entry(own, at, SIZE, 0, N)
        bits = x.to(tl.int32, bitcast=True)
        kept = bits >= found
        if ties:
            equal = bits == found
            rank = done + tl.cumsum(equal.to(tl.int32), 0) - 1
            kept = (bits > found) | (equal & (rank < spare))
            done += tl.sum(equal.to(tl.int32), 0)
        tl.store(kept_ptr + row * SIZE + n, kept.to(tl.int8), mask=n < SIZE)


@triton.jit(do_not_specialize=["K", "m", "LEAST"])
def cover_kernel(
    vertical_ptr,
    slash_ptr,
    guess_ptr,
    mass_ptr,
    columns_ptr,
    diagonals_ptr,
    aware_ptr,
    gamma,
    tau,
    stride_v,
    K,
    m,
    LEAST,
    SIDE: tl.constexpr,
    SP: tl.constexpr,
    NB: tl.constexpr,
    MP: tl.constexpr,
    NJ: tl.constexpr,
):
    """Columns (kind 0) or diagonals (kind 1) of blocks that cover a mass; is the guess good?"""
    row, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = mass_ptr + (row * 2 + kind) * 3 * MP
    off = tl.arange(0, SP)
    crossing = off.to(tl.float32) / SIDE
    for start in range(0, MP, NB):
        t = start + tl.arange(0, NB)
        n = t[:, None] * SIDE + off[None, :]
        inside = (off < SIDE)[None, :] & (n < K)
        v = tl.load(vertical_ptr + row * stride_v + n, mask=inside, other=0.0)
        s = tl.load(slash_ptr + row * K + n, mask=inside, other=0.0)
        over = tl.sum(s * crossing[None, :], 1)
        tl.store(own + t, tl.sum(v, 1))
        tl.store(own + MP + t, tl.sum(s, 1) - over)
        tl.store(own + 2 * MP + t, over)
    tl.debug_barrier()
    j = tl.arange(0, MP)
    true = tl.load(own + j)
    guess = tl.load(guess_ptr + row * m + j, mask=j < m, other=0.0)
    middle = tl.maximum((guess + true) / 2, 1.17549435e-38)
    apart = guess * tl.log(tl.maximum(guess / middle, 1.17549435e-38))
    apart += true * tl.log(tl.maximum(true / middle, 1.17549435e-38))
    aware = tl.sqrt(tl.maximum(tl.sum(apart, 0) / 2, 0.0)) < tau
    last = (K + SIDE - 1) // SIDE - 1
    # What seemed to cross the last diagonal cannot: the first keys lie in its corner.
    slash = tl.load(own + MP + j) + tl.load(own + 2 * MP + j - 1, mask=j > 0, other=0.0)
    slash += tl.where(j == last, tl.load(own + 2 * MP + j), 0.0)
    mass = tl.where(kind == 0, true, tl.where(j <= last, slash, 0.0))
    tl.debug_barrier()
    tl.store(own + j, mass)
    tl.debug_barrier()
    rank = tl.zeros((MP,), dtype=tl.int32)
    before = tl.zeros((MP,), dtype=tl.float32)
    for start in range(0, m, NJ):
        k = start + tl.arange(0, NJ)
        other = tl.load(own + k, mask=k < m, other=-1.0)
        ahead = (other[:, None] > mass[None, :]) | (
            (other[:, None] == mass[None, :]) & (k[:, None] < j[None, :])
        )
        rank += tl.sum(ahead.to(tl.int32), 0)
        before += tl.sum(tl.where(ahead, other[:, None], 0.0), 0)
    kept = (rank < LEAST) | ((before < gamma) & (aware == 0))
    # The first block and the queries' own are always read.
    kept = (kept & ((kind == 0) | (j <= last))) | (j == 0)
    if kind == 0:
        tl.store(columns_ptr + row * m + j, kept.to(tl.int8), mask=j < m)
        tl.store(aware_ptr + row, aware.to(tl.int8))
    else:
        to = diagonals_ptr + row * (m + 2)
        tl.store(to + j + 1, kept.to(tl.int8), mask=j < m)
        tl.store(to, 0)
        tl.store(to + m + 1, 0)


@triton.jit(do_not_specialize=["K", "m", "WIDE", "SINK", "LOCAL", "SIDE", "SHIFT"])
def top_kernel(
    vertical_ptr,
    slash_ptr,
    wanted_ptr,
    places_ptr,
    columns_ptr,
    diagonals_ptr,
    stride_v,
    G,
    K,
    m,
    WIDE,
    SINK,
    LOCAL,
    SIDE,
    SHIFT,
    N: tl.constexpr,
):
    """Places of the best keys (kind 0), or block diagonals of the best distances (kind 1)."""
    row, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wanted = wanted_ptr + (row % G) * 4
    count = tl.minimum(tl.load(wanted + kind), K)
    i = tl.arange(0, N)
    forced = LOCAL
    own = slash_ptr + row * K
    if kind == 0:
        forced = SINK
        own = vertical_ptr + row * stride_v
        near = tl.load(wanted + 2)
        for at in range(0, m, N):
            flag = (at + i < near).to(tl.int8)
            tl.store(columns_ptr + row * m + at + i, flag, mask=at + i < m)
        for at in range(0, WIDE, N):
            free = (at + i >= count) & (at + i < WIDE)
            tl.store(places_ptr + row * WIDE + at + i, -1 + i * 0, mask=free)
    else:
        recent = tl.load(wanted + 3)
        for at in range(0, m + 2, N):
            close = (at + i - 1) * SIDE + SHIFT < SIDE + recent - 1
            flag = tl.full((N,), 1, dtype=tl.int8)
            tl.store(diagonals_ptr + row * (m + 2) + at + i, flag, mask=close & (at + i < m + 2))
    if count > 0:
        found, above = _search(own, K, forced, count, N, False)
        spare = count - above
        # Not even all entries are enough where those below 0 would have to be counted.
        done = tl.full((), 0, tl.int32)
        equals = tl.full((), 0, tl.int32)
        for at in range(0, K, N):
            n, x = _entry(own, at, K, forced, N)
            bits = x.to(tl.int32, bitcast=True)
            equal = bits == found
            kept = (bits > found) | (
                equal & (equals + tl.cumsum(equal.to(tl.int32), 0) - 1 < spare)
            )
            equals += tl.sum(equal.to(tl.int32), 0)
            if kind == 0:
                rank = done + tl.cumsum(kept.to(tl.int32), 0) - 1
                tl.store(places_ptr + row * WIDE + rank, n, mask=kept)
                done += tl.sum(kept.to(tl.int32), 0)
            else:
                # A distance crosses two diagonals of blocks unless it is one's own.
                t = (n + SIDE - SHIFT) // SIDE
                to = diagonals_ptr + row * (m + 2) + t
                one = tl.full((N,), 1, dtype=tl.int8)
                tl.store(to, one, mask=kept & (t < m + 2))
                past = (n + SIDE - SHIFT) % SIDE > 0
                tl.store(to + 1, one, mask=kept & past & (t + 1 < m + 2))


@triton.jit(do_not_specialize=["n", "m", "BASE", "QUERIES", "HIGH", "WIDE", "SHIFT"])
def list_kernel(
    map_ptr,
    use_ptr,
    columns_ptr,
    diagonals_ptr,
    ends_ptr,
    indices_ptr,
    n,
    m,
    BASE,
    QUERIES,
    HIGH,
    WIDE,
    SHIFT,
    MP: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_USE: tl.constexpr,
    HAS_LINES: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Count, or write, the blocks that one block of queries reads."""
    i, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j = tl.arange(0, MP)
    kept = j < 0
    if HAS_MAP:
        named = tl.load(map_ptr + (row * n + i) * m + j, mask=j < m, other=0) != 0
        if HAS_USE:
            named = named & (tl.load(use_ptr + row) != 0)
        kept = kept | named
    if HAS_LINES:
        kept = kept | (tl.load(columns_ptr + row * m + j, mask=j < m, other=0) != 0)
        t = i - j + SHIFT
        inside = (t >= 0) & (t < m + 2) & (j < m)
        kept = kept | (tl.load(diagonals_ptr + row * (m + 2) + t, mask=inside, other=0) != 0)
        last = BASE + tl.minimum(i * HIGH + HIGH, QUERIES) - 1
        kept = kept & (j * WIDE <= last) & (j < m)
    at = ends_ptr + row * (n + 1) + i
    if WRITE:
        to = tl.load(at) + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(indices_ptr + to, j.to(tl.int64), mask=kept)
    else:
        tl.store(at + 1, tl.sum(kept.to(tl.int32), 0))
        if i == 0:
            tl.store(at, 0)
