"""The Triton programs of the gathered products; what they compute is in triton_gemv.py.

Shapes: B = rows of x, at most 4; INNER, OUTER = in and out features; S = runs of channels.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["axpy_kernel", "dot_kernel", "finish_kernel", "swiglu_kernel"]


@triton.jit
def _scale(h_ptr, H, epsilon, HP: tl.constexpr):
    """Reciprocal root mean square of the one row of h."""
    at = tl.arange(0, HP)
    h = tl.load(h_ptr + at, mask=at < H, other=0.0).to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(h * h, 0) / H + epsilon)


@triton.jit
def axpy_kernel(
    x_ptr,
    cut_ptr,
    norm_ptr,
    index_ptr,
    w_ptr,
    found_ptr,
    value_ptr,
    part_ptr,
    seen_ptr,
    INNER,
    OUTER,
    K,
    LENGTH,
    epsilon,
    B: tl.constexpr,
    CUTS: tl.constexpr,
    INDEX: tl.constexpr,
    NORM: tl.constexpr,
    SEEN: tl.constexpr,
    HP: tl.constexpr,
    RUN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile, run = tl.program_id(0), tl.program_id(1)
    runs = tl.num_programs(1)
    if EARLY:
        gdc_wait()
    k = run * LENGTH + tl.arange(0, RUN)
    inside = (k < K) & (tl.arange(0, RUN) < LENGTH)
    if INDEX:
        c = tl.load(index_ptr + k, mask=inside, other=0).to(tl.int32)
        inside = inside & (c >= 0) & (c < INNER)
        c = tl.where(inside, c, 0)
    else:
        c = k
    if CUTS == 1:
        cut = tl.load(cut_ptr)
    elif CUTS > 1:
        cut = tl.load(cut_ptr + c, mask=inside, other=0.0)
    if NORM:
        scale = _scale(x_ptr, INNER, epsilon, HP)
        gain = tl.load(norm_ptr + c, mask=inside, other=0.0).to(tl.float32)
    keep = tl.zeros((RUN,), dtype=tl.int1)
    for b in tl.static_range(B):
        x = tl.load(x_ptr + b * INNER + c, mask=inside, other=0.0).to(tl.float32)
        if NORM:  # rounded where the model rounds, so that thresholds see the same numbers
            x = (x * scale).to(x_ptr.dtype.element_ty).to(tl.float32) * gain
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        kept = inside
        if CUTS > 0:
            kept = kept & ~(tl.abs(x) <= cut)
        keep = keep | kept
    at = tl.cumsum(keep.to(tl.int32), 0) - 1
    count = tl.sum(keep.to(tl.int32), 0)
    own = (tile * runs + run) * RUN
    tl.store(found_ptr + own + at, c, mask=keep)
    for b in tl.static_range(B):
        x = tl.load(x_ptr + b * INNER + c, mask=inside, other=0.0).to(tl.float32)
        if NORM:  # rounded where the model rounds, so that thresholds see the same numbers
            x = (x * scale).to(x_ptr.dtype.element_ty).to(tl.float32) * gain
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        if CUTS > 0:
            x = tl.where(tl.abs(x) <= cut, 0.0, x)
        tl.store(value_ptr + own * B + b * RUN + at, x, mask=keep)
    if SEEN:  # noqa: SIM102 - one is known when compiling, the other is not
        if tile == 0:
            tl.atomic_add(seen_ptr, count)
    tl.debug_barrier()
    if EARLY:
        gdc_launch_dependents()
    o = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    column = o < OUTER
    s0 = tl.zeros((OUTPUTS,), dtype=tl.float32)
    s1 = tl.zeros((OUTPUTS,), dtype=tl.float32)
    s2 = tl.zeros((OUTPUTS,), dtype=tl.float32)
    s3 = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for first in tl.range(0, count, TOGETHER, num_stages=STAGES):
        r = first + tl.arange(0, TOGETHER)
        live = r < count
        channel = tl.load(found_ptr + own + r, mask=live, other=0).to(tl.int64)
        w = tl.load(
            w_ptr + channel[:, None] * OUTER + o[None, :],
            mask=live[:, None] & column[None, :],
            other=0.0,
        ).to(tl.float32)
        value = value_ptr + own * B + r
        s0 += tl.sum(w * tl.load(value, mask=live, other=0.0)[:, None], 0)
        if B > 1:
            s1 += tl.sum(w * tl.load(value + RUN, mask=live, other=0.0)[:, None], 0)
        if B > 2:
            s2 += tl.sum(w * tl.load(value + 2 * RUN, mask=live, other=0.0)[:, None], 0)
        if B > 3:
            s3 += tl.sum(w * tl.load(value + 3 * RUN, mask=live, other=0.0)[:, None], 0)
    to = part_ptr + run * B * OUTER + o
    tl.store(to, s0, mask=column)
    if B > 1:
        tl.store(to + OUTER, s1, mask=column)
    if B > 2:
        tl.store(to + 2 * OUTER, s2, mask=column)
    if B > 3:
        tl.store(to + 3 * OUTER, s3, mask=column)


@triton.jit
def finish_kernel(
    part_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    OUTER,
    S,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RUNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The sums of all runs, in order; plus bias, plus what came before."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    b = tl.program_id(1)
    B = tl.num_programs(1)
    inside = o < OUTER
    total = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for first in range(0, S, RUNS):
        s = first + tl.arange(0, RUNS)
        part = tl.load(
            part_ptr + (s[:, None] * B + b) * OUTER + o[None, :],
            mask=(s < S)[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(part, 0)
    if BIAS:
        total += tl.load(bias_ptr + o, mask=inside, other=0.0)
    if RESIDUAL:
        total += tl.load(residual_ptr + b * OUTER + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + b * OUTER + o, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(
    part_ptr, y_ptr, F, S, OUTPUTS: tl.constexpr, RUNS: tl.constexpr, EARLY: tl.constexpr
):
    """silu of the first half times the second half, of sums over all runs in order."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    b = tl.program_id(1)
    B = tl.num_programs(1)
    inside = o < F
    gate = tl.zeros((OUTPUTS,), dtype=tl.float32)
    up = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for first in range(0, S, RUNS):
        s = first + tl.arange(0, RUNS)
        mask = (s < S)[:, None] & inside[None, :]
        at = part_ptr + (s[:, None] * B + b) * (2 * F) + o[None, :]
        gate += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        up += tl.sum(tl.load(at + F, mask=mask, other=0.0), 0)
    value = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + b * F + o, value.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot_kernel(
    x_ptr,
    index_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    INNER,
    OUTER,
    K,
    B: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index_ptr + k, mask=k < K, other=0).to(tl.int64)
    live = (k < K) & (row >= 0) & (row < OUTER)
    for b in tl.static_range(B):
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for first in range(0, INNER, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            w = tl.load(
                w_ptr + row[:, None] * INNER + c[None, :],
                mask=live[:, None] & (c < INNER)[None, :],
                other=0.0,
            ).to(tl.float32)
            x = tl.load(x_ptr + b * INNER + c, mask=c < INNER, other=0.0).to(tl.float32)
            total += tl.sum(w * x[None, :], 1)
        if BIAS:
            total += tl.load(bias_ptr + row, mask=live, other=0.0)
        tl.store(y_ptr + b * K + k, total.to(y_ptr.dtype.element_ty), mask=k < K)
