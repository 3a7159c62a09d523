"""The gathered products on CUDA, in Triton: deterministic, captured by CUDA graphs.

A program owns a tile of outputs and a run of channels. It finds the active channels of its run,
writes their numbers side by side (that costs no launch of its own), and adds up their rows;
sums of the runs are added in a second pass, in order. No atomics: results never change.
Shapes: B = rows of x, at most 4; I = in features; O = out features; S = runs of channels.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.language.extra.cuda import (  # pyright: ignore[reportMissingImports]
    gdc_launch_dependents,
    gdc_wait,
)

from gossamer.kernels.gather_gemv.rows import Rows

__all__ = [
    "Plan",
    "axpy_partial",
    "axpy_triton",
    "dot_triton",
    "early",
    "finish",
    "launch_options",
    "plan_for",
    "swiglu",
]


class Plan(NamedTuple):
    """How a product is cut up.

    Parameters
    ----------
    outputs : of a tile, a power of 2. runs : into which the channels are cut.
    together : rows loaded at once. warps : of a program. stages : loads on their way at once.
    """

    outputs: int
    runs: int
    together: int
    warps: int
    stages: int = 1


def plan_for(inner: int, out: int, processors: int = 132) -> Plan:
    """Tiles of 2 KB of a row, and runs of 128 channels or more that fill the device once.

    Three loads of eight rows take 33 KB of shared memory: six programs fit a processor.
    """
    outputs = min(1024, max(16, triton.next_power_of_2(out)))
    tiles = triton.cdiv(out, outputs)
    runs = max(1, min(6 * processors // tiles, triton.cdiv(inner, 128)))
    return Plan(outputs, runs, 8, max(1, outputs // 256), 3)


@triton.jit
def _scale(h_ptr, H, epsilon, HP: tl.constexpr):
    """Reciprocal root mean square of the one row of h."""
    at = tl.arange(0, HP)
    h = tl.load(h_ptr + at, mask=at < H, other=0.0).to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(h * h, 0) / H + epsilon)


@triton.jit
def _axpy_kernel(
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
def _finish_kernel(
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
def _swiglu_kernel(
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
def _dot_kernel(
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


@cache
def _nothing(device: torch.device) -> Tensor:
    """Stands for an argument that is not used."""
    return torch.zeros(1, device=device)


@cache
def early(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it ends (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, Any]:
    """What such a kernel is launched with; it must call ``gdc_wait`` before it reads anything."""
    return {"launch_pdl": True} if early(device) else {}


def axpy_partial(
    x: Tensor,
    weight: Tensor,
    cut: Tensor | None = None,
    index: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    epsilon: float = 1e-6,
    plan: Plan | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Sums over every run of channels, float32 (S, B, O); :func:`finish` adds them up.

    Parameters
    ----------
    x : (B, I), contiguous. weight : (I, O), contiguous. cut, index : as for ``axpy_gemv``.
    norm : (I,), gains of an RMS norm that x, of one row then, goes through first.
    seen : int32 (1,), the number of active channels is added here.
    """
    (batch, inner), out = x.shape, weight.shape[1]
    count = inner if index is None else len(index)
    plan = plan or plan_for(inner, out)
    length = max(1, triton.cdiv(count, plan.runs))
    size = triton.next_power_of_2(length)
    tiles, runs = triton.cdiv(out, plan.outputs), max(1, triton.cdiv(count, length))
    none = _nothing(x.device)
    part = torch.empty(runs, batch, out, device=x.device, dtype=torch.float32)
    found = torch.empty(tiles * runs * size, device=x.device, dtype=torch.int32)
    value = torch.empty(tiles * runs * size * batch, device=x.device, dtype=torch.float32)
    kernel: Any = _axpy_kernel
    kernel[(tiles, runs)](
        *(x, none if cut is None else cut, none if norm is None else norm),
        *(none if index is None else index, weight, found, value, part),
        *(none if seen is None else seen, inner, out, count, length, epsilon),
        B=batch,
        CUTS=0 if cut is None or index is not None else (1 if cut.numel() == 1 else 2),
        INDEX=index is not None,
        NORM=norm is not None,
        SEEN=seen is not None,
        HP=triton.next_power_of_2(inner) if norm is not None else 1,
        RUN=size,
        OUTPUTS=plan.outputs,
        TOGETHER=plan.together,
        STAGES=plan.stages,
        EARLY=early(x.device),
        num_warps=plan.warps,
        **launch_options(x.device),
    )
    return part


def finish(
    part: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """(S, B, O) sums to (B, O): added in order, plus bias (O,), plus a residual (B, O)."""
    runs, batch, out = part.shape
    y = torch.empty(batch, out, device=part.device, dtype=dtype)
    none = _nothing(part.device)
    kernel: Any = _finish_kernel
    kernel[(triton.cdiv(out, 32), batch)](
        *(part, none if bias is None else bias, none if residual is None else residual, y),
        *(out, runs),
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        OUTPUTS=32,
        RUNS=min(128, triton.next_power_of_2(runs)),
        EARLY=early(part.device),
        num_warps=4,
        **launch_options(part.device),
    )
    return y


def swiglu(part: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, B, 2F) sums of gate and up to silu(gate) · up, (B, F)."""
    runs, batch, out = part.shape
    y = torch.empty(batch, out // 2, device=part.device, dtype=dtype)
    kernel: Any = _swiglu_kernel
    kernel[(triton.cdiv(out // 2, 32), batch)](
        *(part, y, out // 2, runs),
        OUTPUTS=32,
        RUNS=min(64, triton.next_power_of_2(runs)),
        EARLY=early(part.device),
        num_warps=4,
        **launch_options(part.device),
    )
    return y


def axpy_triton(
    x: Tensor,
    layer: Rows,
    cut: Tensor | None = None,
    index: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """``axpy_gemv`` on CUDA; rows beyond four are taken four at a time."""
    pieces = [
        finish(
            axpy_partial(part.contiguous(), layer.weight, cut, index, plan=plan),
            x.dtype,
            layer.bias,
        )
        for part in x.split(4)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def dot_triton(x: Tensor, layer: Rows, index: Tensor) -> Tensor:
    """``dot_gemv`` on CUDA."""
    (batch, inner), count = x.shape, len(index)
    y = torch.empty(batch, count, device=x.device, dtype=x.dtype)
    if count == 0:
        return y
    kernel: Any = _dot_kernel
    kernel[(triton.cdiv(count, 4),)](
        *(x.contiguous(), index, layer.weight),
        *(_nothing(x.device) if layer.bias is None else layer.bias, y),
        *(inner, layer.out_features, count),
        B=batch,
        BIAS=layer.bias is not None,
        ROWS=4,
        COLUMNS=min(1024, triton.next_power_of_2(inner)),
        num_warps=4,
    )
    return y
