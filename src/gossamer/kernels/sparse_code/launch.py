"""Launching the Triton kernels of sparse codes: grids, blocks and outputs.

Imported where a GPU is used, since it imports triton.
Shapes: R = rows, K = entries of a row, D = width, M = atoms or columns.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor, nn

from gossamer.kernels.sparse_code.segments import PIECE, Segments
from gossamer.kernels.sparse_code.triton_code import (
    atom_gradient_kernel,
    combine_pieces_kernel,
    decode_kernel,
    value_gradient_kernel,
)
from gossamer.kernels.sparse_code.triton_select import chunk_max_kernel, select_kernel

__all__ = [
    "atom_gradient_triton",
    "decode_triton",
    "selectable",
    "top_rows_triton",
    "value_gradient_triton",
]

_CHUNK = 64
_WIDEST = 1 << 14  # entries one program selects from
_BLOCK = 2048  # columns of a row that one program holds


@contextmanager
def on(tensor: Tensor) -> Iterator[None]:
    """Kernels start on the device of a tensor, which need not be the current one."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def selectable(columns: int, keep: int) -> bool:
    """Whether the kernel chooses so many of so many: in one program, or chunk by chunk."""
    chunks = triton.cdiv(columns, _CHUNK)
    return columns <= _WIDEST or (keep <= min(chunks, _WIDEST // _CHUNK) and chunks <= _WIDEST)


def _select(score: Tensor, keep: int, chunks: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows, columns = score.shape
    out = torch.empty(rows, keep, dtype=dtype, device=score.device)
    wide = triton.next_power_of_2(columns if chunks is None else keep * _CHUNK)
    select_kernel[(rows,)](
        score,
        out if chunks is None else chunks,
        out,
        columns,
        keep,
        BITS=16 if score.dtype == torch.bfloat16 else 32,
        GATHER=chunks is not None,
        CHUNK=_CHUNK,
        WIDE=wide,
        num_warps=4 if wide <= 4096 else 8,
    )
    return out


def top_rows_triton(score: Tensor, keep: int) -> Tensor:
    """Columns of the ``keep`` largest of each row, rising, ties to the lower; int64 (R, keep)."""
    rows, columns = score.shape
    score = score.contiguous()
    if not rows:
        return torch.empty(0, keep, dtype=torch.int64, device=score.device)
    with on(score):
        if columns <= _WIDEST:
            return _select(score, keep, None, torch.int64)
        count = triton.cdiv(columns, _CHUNK)
        best = torch.empty(rows, count, dtype=score.dtype, device=score.device)
        block = 64
        chunk_max_kernel[(rows, triton.cdiv(count, block))](
            score, best, columns, count, CHUNK=_CHUNK, BLOCK=block, num_warps=4
        )
        chunks = _select(best, keep, None, torch.int32)
        return _select(score, keep, chunks, torch.int64)


def _block(width: int) -> int:
    return min(_BLOCK, max(16, triton.next_power_of_2(width)))


def _padded(codes: Tensor, fill: int) -> Tensor:
    """Codes (R, K) as wide as one of few sizes: each is compiled for, and batch rules vary K."""
    K = codes.shape[1]
    wide = triton.next_power_of_2(max(1, K)) if K <= 64 else 64 * triton.cdiv(K, 64)
    return codes.contiguous() if wide == K else nn.functional.pad(codes, (0, wide - K), value=fill)


def decode_triton(values: Tensor, indices: Tensor, atoms: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, D) sums of the named atoms, in ``dtype``."""
    indices, values = _padded(indices, -1), _padded(values, 0)
    R, K = indices.shape
    D = atoms.shape[1]
    out = torch.empty(R, D, dtype=dtype, device=atoms.device)
    block = _block(D)
    if R:
        with on(atoms):
            decode_kernel[(R, triton.cdiv(D, block))](
                values,
                indices,
                atoms,
                out,
                K,
                D,
                UNROLL=8,
                BLOCK=block,
                num_warps=4,
            )
    return out


def value_gradient_triton(
    rows: Tensor, indices: Tensor, atoms: Tensor, dtype: torch.dtype
) -> Tensor:
    """(R, K) products of rows and named atoms, in ``dtype``."""
    real = indices.shape[1]
    indices = _padded(indices, -1)
    R, K = indices.shape
    D = atoms.shape[1]
    out = torch.empty(R, K, dtype=dtype, device=atoms.device)
    if R:
        with on(atoms):
            value_gradient_kernel[(R,)](
                rows,
                indices,
                atoms,
                out,
                K,
                D,
                TILE=4,
                BLOCK=_block(D),
                num_warps=4,
            )
    return out[:, :real]


def atom_gradient_triton(
    values: Tensor, segments: Segments, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """(M, D) sums of rows by atom, in ``dtype``."""
    M, D = len(segments.start) - 1, rows.shape[1]
    P = len(segments.owner)
    out = torch.empty(M, D, dtype=dtype, device=rows.device)
    pieces = torch.empty(max(1, P), D, dtype=torch.float32, device=rows.device)
    block = _block(D)
    columns = triton.cdiv(D, block)
    with on(rows):
        atom_gradient_kernel[(M + P, columns)](
            values.reshape(-1)[segments.order],
            segments.tokens,
            segments.start,
            segments.owner,
            segments.before,
            rows,
            out,
            pieces,
            M,
            D,
            L=PIECE,
            UNROLL=4,
            BLOCK=block,
            num_warps=4,
        )
        if P:
            combine_pieces_kernel[(P, columns)](
                segments.owner, segments.before, pieces, out, M, D, BLOCK=block, num_warps=4
            )
    return out
