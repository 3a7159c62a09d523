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
from torch import Tensor

from gossamer.kernels.gather_gemv.rows import Rows
from gossamer.kernels.gather_gemv.triton_kernels import (
    axpy_kernel,
    dot_kernel,
    finish_kernel,
    swiglu_kernel,
)

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
    kernel: Any = axpy_kernel
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
    kernel: Any = finish_kernel
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
    kernel: Any = swiglu_kernel
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
    kernel: Any = dot_kernel
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
