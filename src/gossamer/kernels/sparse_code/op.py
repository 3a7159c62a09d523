"""Sparse codes that training differentiates: choose, read, decode, all without an M-wide code.

On GPUs Triton runs; elsewhere, and for dtypes it does not take, the torch definitions do, which
are the fast path on CPUs too. Gradients touch only the atoms that a code names, and are summed in
one order: equal inputs give equal bits.
Shapes: R = rows, K = entries of a row, D = width, M = latents.
"""

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gossamer.core.errors import GossamerError
from gossamer.kernels.sparse_code.reference import (
    atom_gradient_reference,
    decode_reference,
    top_rows_reference,
    value_gradient_reference,
)
from gossamer.kernels.sparse_code.segments import Segments

__all__ = ["decode", "encode_at", "top_rows", "usable"]

_FLOATS = (torch.float32, torch.bfloat16)


@cache
def usable(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: a GPU of compute capability 8.0 or more."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda":
        # Triton's interpreter: slow, for tests.
        return os.environ.get("TRITON_INTERPRET") == "1"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _triton(tensor: Tensor) -> bool:
    return tensor.dtype in _FLOATS and usable(tensor.device)


def top_rows(score: Tensor, keep: int) -> Tensor:
    """The columns that ``Unstructured("row").select(score, Budget(keep=keep))`` keeps.

    Exact, ties to the lower column. On a GPU nothing waits for the device, so a NaN is not
    refused there: it ranks above all numbers and shows in whatever is made of it.

    Parameters
    ----------
    score : (R, M), no NaN. keep : at most M.

    Returns
    -------
    int64, (R, keep); the order within a row is best first, or rising on a GPU.

    Raises
    ------
    GossamerError
        If ``keep`` is not in 1 to M, or on CPU a score is NaN.
    """
    rows, columns = score.shape
    if not 0 < keep <= columns:
        raise GossamerError(f"k is {keep}; a code of {columns} latents keeps 1 to {columns}")
    if _triton(score):
        from gossamer.kernels.sparse_code.launch import selectable, top_rows_triton

        if selectable(columns, keep):
            return top_rows_triton(score, keep)
    indices = top_rows_reference(score, keep)
    # torch ranks NaN first, so a row that holds one has it among the kept.
    if rows and bool(score.gather(1, indices).isnan().any()):
        raise GossamerError("activations hold NaN, which has no rank; load the model in float32")
    return indices


def _decode(values: Tensor, indices: Tensor, atoms: Tensor, dtype: torch.dtype) -> Tensor:
    if _triton(atoms):
        from gossamer.kernels.sparse_code.launch import decode_triton

        return decode_triton(values, indices, atoms.contiguous(), dtype)
    return decode_reference(values, indices, atoms).to(dtype)


def _value_gradient(rows: Tensor, indices: Tensor, atoms: Tensor, dtype: torch.dtype) -> Tensor:
    if _triton(atoms):
        from gossamer.kernels.sparse_code.launch import value_gradient_triton

        rows = rows.to(atoms.dtype).contiguous()
        return value_gradient_triton(rows, indices, atoms.contiguous(), dtype)
    return value_gradient_reference(rows.to(atoms.dtype), indices, atoms).to(dtype)


def _atom_gradients(
    values: Tensor, indices: Tensor, rows: tuple[tuple[Tensor, torch.dtype], ...], count: int
) -> list[Tensor]:
    """For each (R, D) matrix of rows, their sums by atom, (M, D), in the dtype beside it."""
    if _triton(rows[0][0]):
        from gossamer.kernels.sparse_code.launch import atom_gradient_triton

        segments = Segments.of(indices, count)
        return [atom_gradient_triton(values, segments, r.contiguous(), to) for r, to in rows]
    return [atom_gradient_reference(values, indices, r, count).to(to) for r, to in rows]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, atoms: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, atoms)
        wide = torch.float32 if atoms.dtype in (torch.bfloat16, torch.float16) else atoms.dtype
        return _decode(values, indices, atoms, wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, atoms = ctx.saved_tensors
        narrow = grad.to(atoms.dtype)
        back: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[0]:
            back[0] = _value_gradient(narrow, indices, atoms, values.dtype)
        if ctx.needs_input_grad[2]:
            wanted = ((narrow, atoms.dtype),)
            (back[1],) = _atom_gradients(values, indices, wanted, len(atoms))
        return back[0], None, back[1]


def decode(values: Tensor, indices: Tensor, atoms: Tensor) -> Tensor:
    """Sum of the named atoms, each times its value.

    Parameters
    ----------
    values : (R, K), differentiable. indices : int64 (R, K); -1 is padding.
    atoms : (M, D), differentiable: gradients of rows that are not named are zero.

    Returns
    -------
    (R, D), float32 where the atoms are half precision, else of their dtype.
    """
    return _Decode.apply(values, indices, atoms)


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        offset: Tensor | None,
        pre: Tensor,
        indices: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, W_enc, indices)
        ctx.bias = b_enc.dtype
        ctx.offset = None if offset is None else offset.dtype
        return pre.gather(1, indices.clamp_min(0)).masked_fill(indices < 0, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, W_enc, indices = ctx.saved_tensors
        latents = W_enc.T
        needs = ctx.needs_input_grad
        to_rows = to_bias = to_offset = None
        if needs[0]:
            to_rows = _decode(grad, indices, latents, rows.dtype)
        ones = grad.new_ones(len(rows), 1)
        wanted = ((rows, W_enc.dtype), (ones, grad.dtype))
        to_weight, summed = _atom_gradients(grad, indices, wanted, len(latents))
        if needs[2]:
            to_bias = summed[:, 0].to(ctx.bias)
        if needs[3]:
            to_offset = -(W_enc @ summed[:, 0].to(W_enc.dtype)).to(ctx.offset)
        return to_rows, to_weight.T, to_bias, to_offset, None, None


def encode_at(
    rows: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    pre: Tensor,
    indices: Tensor,
    offset: Tensor | None = None,
) -> Tensor:
    """``pre.gather(1, indices)``, differentiable without a gradient as wide as the dictionary.

    Parameters
    ----------
    rows : (R, D), the encoder's input, already less ``offset``.
    W_enc : (D, M); fastest where its memory is one latent a row. b_enc : (M,).
    pre : (R, M) = rows W_enc + b_enc, computed without a graph.
    indices : int64 (R, K); -1 is padding and reads 0.
    offset : (D,) that was taken off the rows, if it is to be trained: its gradient needs one
        product with the summed gradient, not one a row.

    Returns
    -------
    (R, K), of the dtype of ``pre``.
    """
    return _EncodeAt.apply(rows, W_enc, b_enc, offset, pre, indices)
