"""The operator ``gossamer::tiled_linear``: x Wᵀ for a tiled W, by Triton on a GPU.

Elsewhere the definition runs: the product with the matrix laid out densely. CUDA graphs can
capture it and compilers see it as one operation. It is for decoding: of more than 8 inputs it
reads the matrix again for every 8.
"""

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.kernels.sparse_linear.tiled import KINDS, ROWS, Tiled

__all__ = ["register", "tiled_linear", "tiled_linear_reference", "usable"]

_TOGETHER = 8  # inputs of one pass over the matrix


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def usable(device: torch.device | str) -> bool:
    """Whether the Triton kernel runs on a device: a GPU of compute capability 8.0 or more."""
    device = torch.device(device)
    if not _has_triton():
        return False
    if device.type != "cuda":
        # Triton's interpreter: slow, for tests.
        return os.environ.get("TRITON_INTERPRET") == "1"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def tiled_linear_reference(x: Tensor, tiled: Tiled) -> Tensor:
    """(B, I) -> (B, O): x times the matrix with its zeros, in float32, or float64 if x is."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(wide) @ tiled.to_dense().to(wide).T).to(x.dtype)


def tiled_linear(x: Tensor, tiled: Tiled, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, reading only the weights that W keeps.

    NaN or infinity in x may reach rows that keep none of its columns, as in a dense product:
    the zeros that fill the layout are multiplied too.

    Parameters
    ----------
    x : (..., I), of the dtype of W.
    tiled : W, (O, I).
    bias : (O,), added to the product.

    Returns
    -------
    (..., O), dtype of x; sums are float32, in the same order at every call.

    Raises
    ------
    GossamerError
        If x does not end in I or has another dtype.
    """
    if x.shape[-1:] != tiled.shape[1:] or x.dtype != tiled.dtype:
        raise GossamerError(
            f"this matrix takes {tiled.dtype} inputs of {tiled.shape[1]} features; "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if _plain(x) and usable(x.device):
        result = _run(flat, tiled)
    else:
        kind = KINDS.index(tiled.kind)
        result = torch.ops.gossamer.tiled_linear(flat, *tiled.tensors, *tiled.shape, kind)
    result = result.view(*x.shape[:-1], tiled.shape[0])
    return result if bias is None else result + bias


def _plain(x: Tensor) -> bool:
    """Whether neither a compiler nor autograd needs to see the operator, which costs 20 us."""
    seen = torch.compiler.is_compiling() or type(x) is not Tensor
    return not seen and not (torch.is_grad_enabled() and x.requires_grad)


def _run(x: Tensor, tiled: Tiled, unroll: int = 1) -> Tensor:
    """(B, I) -> (B, O) by the kernel, eight inputs at a time."""
    from gossamer.kernels.sparse_linear.triton_rows import rows_kernel

    rows, columns = tiled.shape
    result = x.new_empty(len(x), rows)
    if not result.numel():
        return result
    parts = tiled.values.shape[1]
    values = tiled.values.view(torch.int32)
    for at in range(0, len(x), _TOGETHER):
        some = x[at : at + _TOGETHER]
        batch = len(some)
        width = 1 << (batch - 1).bit_length()
        if width == 1:
            inputs = some.contiguous()
        else:
            inputs = torch.nn.functional.pad(some, (0, 0, 0, width - batch)).T.contiguous()
        launch: Any = rows_kernel[(len(tiled.order) // ROWS,)]  # pyright: ignore[reportIndexIssue]
        launch(
            inputs,
            values,
            tiled.codes,
            tiled.start,
            tiled.first,
            tiled.order,
            result[at : at + batch],
            batch,
            rows,
            columns - 16,
            GROUPED=tiled.kind == "2:4",
            HALF=tiled.dtype == torch.float16,
            B=width,
            R=ROWS,
            S=parts,
            U=unroll,
            num_warps=parts,
        )
    return result


@cache
def register() -> None:
    """Make ``torch.ops.gossamer.tiled_linear`` known to torch; compiles nothing."""

    def run(
        x: Tensor,
        values: Tensor,
        codes: Tensor,
        start: Tensor,
        first: Tensor,
        order: Tensor,
        rows: int,
        columns: int,
        kind: int,
    ) -> Tensor:
        tiled = Tiled(values, codes, start, first, order, (rows, columns), KINDS[kind])
        return _run(x, tiled) if usable(x.device) else tiled_linear_reference(x, tiled)

    def fake(
        x: Tensor,
        values: Tensor,
        codes: Tensor,
        start: Tensor,
        first: Tensor,
        order: Tensor,
        rows: int,
        columns: int,
        kind: int,
    ) -> Tensor:
        return x.new_empty(len(x), rows)

    def keep(ctx, inputs: tuple, output: Tensor) -> None:
        _, *tensors, ctx.rows, ctx.columns, ctx.kind = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx, gradient: Tensor) -> tuple:
        values, codes, start, first, order = ctx.saved_tensors
        shape = (ctx.rows, ctx.columns)
        tiled = Tiled(values, codes, start, first, order, shape, KINDS[ctx.kind])
        return gradient @ tiled.to_dense().to(gradient.dtype), *[None] * 8

    operator = torch.library.custom_op("gossamer::tiled_linear", run, mutates_args=())
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=keep)
