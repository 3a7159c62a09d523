"""Block-sparse attention for Hopper, warps with one task each; the definition is in reference.py.

One warp fetches tiles of queries, keys and values by TMA as far ahead as there is room; two groups
of four warps each own 64 query rows and multiply. A group starts the scores of the next tile before
it weighs the values of this one, so the tensor cores work while exponentials are taken. A program
walks many tiles of queries: the first keys of the next are on their way while the last of this
are weighed.
Shapes: M = 128 rows of a tile, in two halves; N = keys of a tile; D = head width.
"""
# pyright: reportMissingImports=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["special_kernel"]


@gluon.jit
def _place(order_ptr, tile, ROWS, INDEX_HEADS, SHARE, BQ, HEADS: gl.constexpr, QT: gl.constexpr):
    """Where a tile of queries stands: item, batch row, list head, first head, first query."""
    heads = SHARE // HEADS
    parts = (BQ // QT) * heads
    item = gl.load(order_ptr + tile // parts)
    part = tile % parts
    row, listed = item % ROWS, item // ROWS
    b, i = listed // INDEX_HEADS, listed % INDEX_HEADS
    return item, b, i, i * SHARE + (part % heads) * HEADS, row * BQ + (part // heads) * QT


@gluon.jit
def _fetch(
    q_source, k_source, v_source, columns_k, columns_v,
    q_room, k_room, v_room, q_full, q_free, k_full, k_free, v_full, v_free,
    order_ptr, indices_ptr, bounds_ptr,
    TILES, ROWS, INDEX_HEADS, SHARE, REPEAT, BQ,
    BK: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr, QT: gl.constexpr,
    STAGES: gl.constexpr, HAS_COLUMNS: gl.constexpr,
):  # fmt: skip
    """The warp that asks for data."""
    PER: gl.constexpr = BK // N
    count = 0
    turn = 0
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        item, b, i, h, start = _place(order_ptr, tile, ROWS, INDEX_HEADS, SHARE, BQ, HEADS, QT)
        g = h // REPEAT
        begin = gl.load(bounds_ptr + item * 5)
        low = gl.load(bounds_ptr + item * 5 + 1)
        high = gl.load(bounds_ptr + item * 5 + 2)
        end = gl.load(bounds_ptr + item * 5 + 3)
        mbarrier.wait(q_free, (turn & 1) ^ 1)
        mbarrier.expect(q_full, q_source.block_type.nbytes * 2)
        if HEADS == 2:
            tma.async_copy_global_to_shared(q_source, [b, h, start, 0], q_full, q_room.index(0))
            tma.async_copy_global_to_shared(q_source, [b, h + 1, start, 0], q_full, q_room.index(1))
        else:
            tma.async_copy_global_to_shared(q_source, [b, h, start, 0], q_full, q_room.index(0))
            tma.async_copy_global_to_shared(
                q_source, [b, h, start + 64, 0], q_full, q_room.index(1)
            )
        turn += 1  # noqa: SIM113 - the compiler knows no enumerate
        for t in range((end - begin) * PER):
            # First the blocks between low and high, then those before, then those after.
            n = low + t // PER
            n = gl.where(n < high, n, n - high + begin)
            n = gl.where((low + t // PER >= high) & (n >= low), n + high - low, n)
            at = gl.load(indices_ptr + n) * BK + (t % PER) * N
            stage = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_source.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_source, [b, g, at, 0], k_full.index(stage), k_room.index(stage)
            )
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_source.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_source, [b, g, at, 0], v_full.index(stage), v_room.index(stage)
            )
            count += 1
        if HAS_COLUMNS:
            for t in range(gl.load(bounds_ptr + item * 5 + 4)):
                stage = count % STAGES
                phase = ((count // STAGES) & 1) ^ 1
                mbarrier.wait(k_free.index(stage), phase)
                mbarrier.expect(k_full.index(stage), k_source.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    columns_k, [b, i, t * N, 0], k_full.index(stage), k_room.index(stage)
                )
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_source.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    columns_v, [b, i, t * N, 0], v_full.index(stage), v_room.index(stage)
                )
                count += 1


@gluon.jit
def _attend(
    half, q_room, k_room, v_room, q_full, q_free, k_full, k_free, v_full, v_free,
    order_ptr, indices_ptr, bounds_ptr, column_ptr, seen_ptr, first_ptr, sink_ptr, out_ptr,
    stride_ob, stride_on, stride_oh, stride_cb, stride_ch,
    factor, softcap, TILES, Q, K, ROWS, OFFSET, WINDOW, COLUMNS, BLOCKS,
    INDEX_HEADS, SHARE, BQ,
    BK: gl.constexpr, D: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr, QT: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_COLUMNS: gl.constexpr,
    HAS_FIRST: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SINK: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Four warps and 64 rows of every tile."""
    PER: gl.constexpr = BK // N
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, scores)
    of_key: gl.constexpr = gl.SliceLayout(0, scores)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    count = 0
    turn = 0
    for tile in range(gl.program_id(0), TILES, gl.num_programs(0)):
        item, b, i, h, start = _place(order_ptr, tile, ROWS, INDEX_HEADS, SHARE, BQ, HEADS, QT)
        if HEADS == 2:
            h += half
        else:
            start += half * 64
        begin = gl.load(bounds_ptr + item * 5)
        low = gl.load(bounds_ptr + item * 5 + 1)
        high = gl.load(bounds_ptr + item * 5 + 2)
        end = gl.load(bounds_ptr + item * 5 + 3)
        whole = (high - low) * PER
        listed = (end - begin) * PER
        tiles = listed
        if HAS_COLUMNS:
            tiles += gl.load(bounds_ptr + item * 5 + 4)
        first = 0
        if HAS_FIRST:
            first = gl.load(first_ptr + b)
        position = OFFSET + start + gl.arange(0, 64, layout=of_row)
        acc = gl.zeros([64, D], gl.float32, output)
        if HAS_SINK:
            sink = gl.load(sink_ptr + h) * 1.4426950408889634
            top = gl.zeros([64], gl.float32, of_row) + sink
            total = gl.full([64], 1.0, gl.float32, of_row)
        else:
            # A finite floor keeps rows that see nothing free of NaN.
            top = gl.full([64], -1.0e30, gl.float32, of_row)
            total = gl.zeros([64], gl.float32, of_row)
        mbarrier.wait(q_full, turn & 1)
        q = q_room.index(half).reshape([64, D])
        weight = gl.zeros([64, N], dtype, weights)
        for t in range(tiles):
            stage = count % STAGES
            mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
            k = k_room.index(stage).reshape([N, D])
            zero = gl.zeros([64, N], gl.float32, scores)
            score = warpgroup_mma(q, k.permute([1, 0]), zero, use_acc=False, is_async=True)
            # The values of the tile before, in flight while this tile's softmax is taken. The
            # first turn has none: what it adds up is dropped by the second.
            before = (count + STAGES - 1) % STAGES
            if t > 0:
                mbarrier.wait(v_full.index(before), ((count - 1) // STAGES) & 1)
            v = v_room.index(before).reshape([N, D])
            sum_ = warpgroup_mma(weight, v, acc, use_acc=t > 1, is_async=True)
            score = warpgroup_mma_wait(1, [score])
            mbarrier.arrive(k_free.index(stage))
            if SOFTCAP:
                x = score * (factor / softcap)
                score = softcap * (2.0 / (1.0 + gl.exp2(-2.0 * 1.4426950408889634 * x)) - 1.0)
                score = score / factor
            if t >= whole:
                if t < listed:
                    n = low + t // PER
                    n = gl.where(n < high, n, n - high + begin)
                    n = gl.where((low + t // PER >= high) & (n >= low), n + high - low, n)
                    at = gl.load(indices_ptr + n) * BK + (t % PER) * N
                    of = at + gl.arange(0, N, layout=of_key)
                    live = of < K
                else:
                    c = (t - listed) * N + gl.arange(0, N, layout=of_key)
                    own = column_ptr + b * stride_cb + i * stride_ch
                    of = gl.load(own + c, mask=c < COLUMNS, other=-1)
                    live = (of >= 0) & (of < K)
                    map_ = seen_ptr + item.to(gl.int64) * BLOCKS
                    live = live & (gl.load(map_ + of // BK, mask=live, other=1) == 0)
                if HAS_FIRST:
                    live = live & (of >= first)
                seen = gl.expand_dims(live, 0)
                key = gl.expand_dims(of, 0)
                if CAUSAL:
                    seen = seen & (key <= gl.expand_dims(position, 1))
                if HAS_WINDOW:
                    seen = seen & (key > gl.expand_dims(position, 1) - WINDOW)
                score = gl.where(seen, score, float("-inf"))
            new = gl.maximum(top, gl.max(score, 1) * factor)
            power = gl.exp2(score * factor - gl.expand_dims(new, 1))
            shrink = gl.exp2(top - new)
            total = total * shrink + gl.sum(power, 1)
            top = new
            acc = warpgroup_mma_wait(0, [sum_])
            if t > 0:
                mbarrier.arrive(v_free.index(before))
            acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, output)), 1)
            weight = gl.convert_layout(power.to(dtype), weights)
            count += 1
        mbarrier.arrive(q_free)
        turn += 1  # noqa: SIM113 - the compiler knows no enumerate
        if tiles > 0:
            last = (count + STAGES - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)
            acc = warpgroup_mma(weight, v_room.index(last).reshape([N, D]), acc, use_acc=tiles > 1)
            mbarrier.arrive(v_free.index(last))
        total = gl.convert_layout(gl.where(total > 0, total, 1.0), gl.SliceLayout(1, output))
        acc = acc / gl.expand_dims(total, 1)
        at = start + gl.arange(0, 64, layout=gl.SliceLayout(1, output))
        d = gl.arange(0, D, layout=gl.SliceLayout(0, output))
        to = out_ptr + b.to(gl.int64) * stride_ob + h.to(gl.int64) * stride_oh
        places = gl.expand_dims(at.to(gl.int64) * stride_on, 1) + gl.expand_dims(d, 0)
        gl.store(to + places, acc.to(dtype), mask=gl.expand_dims(at < Q, 1))


@gluon.jit(
    do_not_specialize=[
        "TILES",
        "Q",
        "K",
        "ROWS",
        "OFFSET",
        "WINDOW",
        "COLUMNS",
        "BLOCKS",
        "INDEX_HEADS",
    ]
)
def special_kernel(
    q_source, k_source, v_source, columns_k, columns_v, out_ptr,
    indices_ptr, order_ptr, bounds_ptr, column_ptr, seen_ptr, first_ptr, sink_ptr,
    factor, softcap, stride_ob, stride_on, stride_oh, stride_cb, stride_ch,
    TILES, Q, K, ROWS, OFFSET, WINDOW, COLUMNS, BLOCKS, INDEX_HEADS, SHARE, REPEAT, BQ,
    BK: gl.constexpr, D: gl.constexpr, N: gl.constexpr, HEADS: gl.constexpr, QT: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_COLUMNS: gl.constexpr,
    HAS_FIRST: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SINK: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Tiles of queries, every program every so many; arguments as of ``forward_kernel``."""
    dtype: gl.constexpr = q_source.dtype
    q_room = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], q_source.layout)
    k_room = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], k_source.layout)
    v_room = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], v_source.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    gl.warp_specialize(
        [
            (_attend, (0, q_room, k_room, v_room, q_full, q_free, k_full, k_free, v_full, v_free,
                order_ptr, indices_ptr, bounds_ptr, column_ptr, seen_ptr, first_ptr, sink_ptr,
                out_ptr, stride_ob, stride_on, stride_oh, stride_cb, stride_ch, factor, softcap,
                TILES, Q, K, ROWS, OFFSET, WINDOW, COLUMNS, BLOCKS, INDEX_HEADS, SHARE, BQ,
                BK, D, N, HEADS, QT, STAGES, CAUSAL, HAS_COLUMNS, HAS_FIRST, HAS_WINDOW,
                HAS_SINK, SOFTCAP)),
            (_attend, (1, q_room, k_room, v_room, q_full, q_free, k_full, k_free, v_full, v_free,
                order_ptr, indices_ptr, bounds_ptr, column_ptr, seen_ptr, first_ptr, sink_ptr,
                out_ptr, stride_ob, stride_on, stride_oh, stride_cb, stride_ch, factor, softcap,
                TILES, Q, K, ROWS, OFFSET, WINDOW, COLUMNS, BLOCKS, INDEX_HEADS, SHARE, BQ,
                BK, D, N, HEADS, QT, STAGES, CAUSAL, HAS_COLUMNS, HAS_FIRST, HAS_WINDOW,
                HAS_SINK, SOFTCAP)),
            (_fetch, (q_source, k_source, v_source, columns_k, columns_v,
                q_room, k_room, v_room, q_full, q_free, k_full, k_free, v_full, v_free,
                order_ptr, indices_ptr, bounds_ptr,
                TILES, ROWS, INDEX_HEADS, SHARE, REPEAT, BQ,
                BK, N, HEADS, QT, STAGES, HAS_COLUMNS)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
