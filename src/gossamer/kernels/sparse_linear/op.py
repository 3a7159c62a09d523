"""The operator ``gossamer::sparse_linear``: x Wᵀ for a packed W.

Backends: ``cpu`` (C++, compiled on first use), ``reference`` (the definition), and ``auto``,
which takes ``cpu`` for matrices and float inputs in main memory when it can be built, else the
reference. An input of float64 is the reference's: the kernel sums in float32.
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
from gossamer.kernels.sparse_linear import tiled_op
from gossamer.kernels.sparse_linear.pack import LAYOUTS, Packed
from gossamer.kernels.sparse_linear.reference import sparse_linear_reference

__all__ = [
    "Backend",
    "backend_for",
    "instruction_set",
    "register",
    "sparse_linear",
    "usable",
]

Backend = Literal["auto", "reference", "cpu"]

_SOURCE = Path(__file__).with_name("cpu.cpp")
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)
_STORED = {torch.float32: 0, torch.bfloat16: 1}
_LEVELS = ("portable", "AVX2", "AVX-512")


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The compiled library, and the instruction set of this machine."""
    library = build.load(_SOURCE)
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function = library.gossamer_sparse_linear
    function.argtypes = [
        *(pointer, pointer, pointer),  # values, index, start
        *(long, long, long),  # rows, columns, values a row
        *(pointer, pointer, long),  # x, y, batch
        *(number, number, number, number, number),  # layout, dtype, wide, threads, level
        pointer,  # GOMP_parallel
    ]
    function.restype = None
    return library, int(library.gossamer_sparse_level())


@cache
def _parallel() -> int | None:
    """The address of ``GOMP_parallel`` in torch's own thread pool; None: threads of our own.

    Two pools would fight for the cores: threads of the idle one spin for a while.
    """
    folder = Path(torch.__file__).parent
    beside = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    for name in [None, *map(str, beside)]:
        try:
            found = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value
    return None


@cache
def usable() -> bool:
    """Whether the kernel can be built here; the first failure is said in one line."""
    try:
        _library()
    except build.CannotBuild as error:
        logging.getLogger("gossamer").warning("sparse linear runs on torch operations: %s", error)
        return False
    return True


def _fits(x: Tensor, packed: Packed) -> bool:
    tensors = (x, packed.values, packed.index, packed.start)
    here = all(tensor.device.type == "cpu" for tensor in tensors)
    return here and x.dtype in _INPUTS and packed.values.dtype in _STORED


def backend_for(x: Tensor, packed: Packed) -> Literal["reference", "cpu"]:
    """What ``auto`` runs for an input and a matrix."""
    return "cpu" if _fits(x, packed) and usable() else "reference"


def instruction_set() -> str:
    """What the cpu backend runs on here: portable, AVX2 or AVX-512.

    Raises
    ------
    CannotBuild
        If the kernel cannot be compiled.
    """
    return _LEVELS[_library()[1]]


def sparse_linear(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    backend: Backend = "auto",
    level: int | None = None,
) -> Tensor:
    """x Wᵀ + bias, reading only the weights that W keeps.

    On ``auto``, gradients flow to x and bias; the packed weights are constants.

    Parameters
    ----------
    x : (..., I).
    packed : W, (O, I).
    bias : (O,), added to the product.
    backend : ``auto``, ``reference``, or ``cpu``, which raises where it cannot run.
    level : instruction set of backend cpu, 0 portable, 1 AVX2, 2 AVX-512; the best when left out.

    Returns
    -------
    (..., O), dtype of x. Sums are float32 (float64 on the reference when x is), the same for
    any number of threads; threads are torch's, ``torch.get_num_threads()`` of them.

    Raises
    ------
    GossamerError
        If x does not end in I, or a named backend or level cannot run.
    """
    if x.shape[-1:] != packed.shape[1:]:
        raise GossamerError(
            f"this matrix takes inputs of {packed.shape[1]} features; got {tuple(x.shape)}"
        )
    if backend not in ("auto", "reference", "cpu"):
        raise unknown("backend", backend, ("auto", "reference", "cpu"))
    if backend == "auto" and not _plain(x, packed):
        result = torch.ops.gossamer.sparse_linear(
            x, packed.values, packed.index, packed.start, *packed.shape, code(packed)
        )
    else:
        flat = _rows(x.detach())
        cpu = backend == "cpu" or (backend == "auto" and backend_for(x, packed) == "cpu")
        result = _run(flat, packed, level) if cpu else sparse_linear_reference(flat, packed)
        result = result.view(*x.shape[:-1], packed.shape[0])
    return result if bias is None else result + bias


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _plain(x: Tensor, packed: Packed) -> bool:
    """Whether neither a compiler nor autograd needs to see the operator, which costs 10 us."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is type(packed.values) is Tensor
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def code(packed: Packed) -> int:
    """The number of a layout."""
    return LAYOUTS.index(packed.layout)


def _run(x: Tensor, packed: Packed, level: int | None = None) -> Tensor:
    """(B, I) -> (B, O) by the kernel."""
    if not _fits(x, packed):
        raise GossamerError(
            f"backend cpu of sparse linear takes float32, bfloat16 or float16 inputs and float32 "
            f"or bfloat16 weights in main memory; got {x.dtype} on {x.device} and "
            f"{packed.values.dtype} on {packed.values.device}: use backend reference"
        )
    library, best = _library()
    if level is not None and not 0 <= level <= best:
        raise GossamerError(
            f"this machine offers levels 0 to {best} ({_LEVELS[best]}); got {level}"
        )
    rows, columns = packed.shape
    inputs = x.to(torch.float32).contiguous()
    values, index, start = (t.contiguous() for t in (packed.values, packed.index, packed.start))
    result = torch.empty(len(inputs), rows)
    library.gossamer_sparse_linear(
        values.data_ptr(),
        index.data_ptr(),
        start.data_ptr() if len(start) else None,
        rows,
        columns,
        packed.kept // max(1, rows),
        inputs.data_ptr(),
        result.data_ptr(),
        len(inputs),
        0 if packed.layout == "bitmask" else 1,
        _STORED[packed.values.dtype],
        index.dtype == torch.int32,
        torch.get_num_threads(),
        best if level is None else level,
        _parallel(),
    )
    return result.to(x.dtype)


@cache
def register() -> None:
    """Make ``sparse_linear`` and ``tiled_linear`` of ``torch.ops.gossamer`` known to torch.

    Compiles nothing.
    """
    tiled_op.register()

    def run(
        x: Tensor,
        values: Tensor,
        index: Tensor,
        start: Tensor,
        rows: int,
        columns: int,
        layout: int,
    ) -> Tensor:
        packed = Packed(values, index, start, (rows, columns), LAYOUTS[layout])
        flat = _rows(x)
        function = _run if backend_for(x, packed) == "cpu" else sparse_linear_reference
        return function(flat, packed).view(*x.shape[:-1], rows)

    def fake(
        x: Tensor,
        values: Tensor,
        index: Tensor,
        start: Tensor,
        rows: int,
        columns: int,
        layout: int,
    ) -> Tensor:
        return x.new_empty(*x.shape[:-1], rows)

    def keep(ctx, inputs: tuple, output: Tensor) -> None:
        _, values, index, start, *ctx.numbers = inputs
        ctx.save_for_backward(values, index, start)

    def backward(ctx, gradient: Tensor) -> tuple:
        rows, columns, layout = ctx.numbers
        values, index, start = ctx.saved_tensors
        dense = Packed(values, index, start, (rows, columns), LAYOUTS[layout]).to_dense()
        return gradient @ dense.to(gradient.dtype), *[None] * 6

    operator = torch.library.custom_op("gossamer::sparse_linear", run, mutates_args=())
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=keep)
