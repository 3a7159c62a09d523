"""The three products of training with stored connections: W x, W^T d, and d x^T where W stores.

Backends: ``cpu`` (C++, compiled on first use), ``reference`` (the definition), and ``auto``,
which takes ``cpu`` for float32 and float64 in main memory when it can be built.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, unknown
from gossamer.kernels import build
from gossamer.kernels.sparse_linear.op import _parallel
from gossamer.kernels.sparse_training.reference import (
    gradient_reference,
    product_reference,
    transposed_reference,
)
from gossamer.kernels.sparse_training.rows import Connections

__all__ = [
    "Backend",
    "connection_gradient",
    "instruction_set",
    "sparse_product",
    "transposed_product",
]

Backend = Literal["auto", "reference", "cpu"]

_SOURCE = Path(__file__).with_name("cpu.cpp")
_DTYPES = {torch.float32: 0, torch.float64: 1}
_LEVELS = ("portable", "AVX2", "AVX-512")
_PRODUCT, _TRANSPOSED, _GRADIENT = range(3)


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The compiled library, and the instruction set of this machine."""
    library = build.load(_SOURCE)
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function = library.gossamer_training
    function.argtypes = [
        *(number, pointer, pointer, pointer, long),  # op, values, columns, start, rows
        *(pointer, pointer, pointer, long),  # a, b, out, batch
        *(number, number, number, pointer),  # dtype, threads, level, GOMP_parallel
    ]
    function.restype = None
    return library, int(library.gossamer_training_level())


@cache
def _usable() -> bool:
    """Whether the kernel can be built here; the first failure is said in one line."""
    try:
        _library()
    except build.CannotBuild as error:
        logging.getLogger("gossamer").warning("sparse training runs on torch operations: %s", error)
        return False
    return True


def instruction_set() -> str:
    """What the cpu backend runs on here: portable, AVX2 or AVX-512.

    Raises
    ------
    CannotBuild
        If the kernel cannot be compiled.
    """
    return _LEVELS[_library()[1]]


def _compiled(matrix: Connections, a: Tensor, backend: Backend) -> bool:
    if backend not in ("auto", "reference", "cpu"):
        raise unknown("backend", backend, ("auto", "reference", "cpu"))
    fits = a.dtype in _DTYPES and matrix.values.dtype == a.dtype and a.device.type == "cpu"
    if backend == "cpu" and not fits:
        raise GossamerError(
            f"backend cpu of sparse training takes float32 or float64 in main memory, the same for "
            f"weights and activations; got {matrix.values.dtype} and {a.dtype} on {a.device}: use "
            "backend reference"
        )
    return backend == "cpu" or (backend == "auto" and fits and _usable())


def _rows(name: str, tensor: Tensor, wanted: int) -> Tensor:
    if tensor.dim() != 2 or tensor.shape[0] != wanted:
        raise GossamerError(
            f"{name} has one feature a row: ({wanted}, batch); got {tuple(tensor.shape)}"
        )
    return tensor.detach().contiguous()


def _run(
    op: int, matrix: Connections, a: Tensor, b: Tensor | None, out: Tensor, level: int | None
) -> Tensor:
    library, best = _library()
    if level is not None and not 0 <= level <= best:
        raise GossamerError(
            f"this machine offers levels 0 to {best} ({_LEVELS[best]}); got {level}"
        )
    if a.shape[1] and len(matrix):
        library.gossamer_training(
            op,
            matrix.values.detach().data_ptr(),
            matrix.columns.data_ptr(),
            matrix.start.data_ptr(),
            matrix.shape[0],
            a.data_ptr(),
            None if b is None else b.data_ptr(),
            out.data_ptr(),
            a.shape[1],
            _DTYPES[a.dtype],
            torch.get_num_threads(),
            best if level is None else level,
            _parallel(),
        )
    return out


def sparse_product(
    matrix: Connections, x: Tensor, backend: Backend = "auto", level: int | None = None
) -> Tensor:
    """W x, reading only the connections that exist.

    Parameters
    ----------
    matrix : W, (O, I). x : (I, B), one feature a row.
    backend : ``auto``, ``reference``, or ``cpu``, which raises where it cannot run.
    level : instruction set of backend cpu, 0 portable, 1 AVX2, 2 AVX-512; the best when left out.

    Returns
    -------
    (O, B). The same bits for any number of threads, which are torch's.

    Raises
    ------
    GossamerError
        If shapes do not fit, or a named backend or level cannot run.
    """
    x = _rows("x", x, matrix.shape[1])
    if not _compiled(matrix, x, backend):
        return product_reference(matrix, x)
    out = x.new_zeros(matrix.shape[0], x.shape[1])
    return _run(_PRODUCT, matrix, x, None, out, level)


def transposed_product(
    matrix: Connections, delta: Tensor, backend: Backend = "auto", level: int | None = None
) -> Tensor:
    """W^T delta: what flows back through the connections that exist.

    Parameters
    ----------
    matrix : W, (O, I). delta : (O, B). backend, level : as for :func:`sparse_product`.

    Returns
    -------
    (I, B).

    Raises
    ------
    GossamerError
        If shapes do not fit, or a named backend or level cannot run.
    """
    delta = _rows("delta", delta, matrix.shape[0])
    if not _compiled(matrix, delta, backend):
        return transposed_reference(matrix, delta)
    out = delta.new_zeros(matrix.shape[1], delta.shape[1])
    return _run(_TRANSPOSED, matrix, delta, None, out, level)


def connection_gradient(
    matrix: Connections,
    delta: Tensor,
    x: Tensor,
    backend: Backend = "auto",
    level: int | None = None,
) -> Tensor:
    """The entries of delta x^T at the connections of W: its gradient, nowhere else computed.

    Parameters
    ----------
    matrix : W, (O, I), read for where it stores. delta : (O, B). x : (I, B).
    backend, level : as for :func:`sparse_product`.

    Returns
    -------
    (K,), summed over the batch.

    Raises
    ------
    GossamerError
        If shapes do not fit, or a named backend or level cannot run.
    """
    delta, x = _rows("delta", delta, matrix.shape[0]), _rows("x", x, matrix.shape[1])
    if delta.shape[1] != x.shape[1] or delta.dtype != x.dtype:
        raise GossamerError(
            f"delta and x are of one batch and dtype; got {tuple(delta.shape)} {delta.dtype} and "
            f"{tuple(x.shape)} {x.dtype}"
        )
    if not _compiled(matrix, delta, backend):
        return gradient_reference(matrix, delta, x)
    return _run(_GRADIENT, matrix, delta, x, x.new_zeros(len(matrix)), level)
