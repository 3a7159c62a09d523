"""The operator ``gossamer::sparse_conv``: a 1x1 convolution with bias and clamp, weights packed.

Backends: ``cpu`` (C++, compiled on first use), ``reference`` (the definition), and ``auto``,
which takes ``cpu`` for float32 in main memory when it can be built, else the reference.
"""

import ctypes
import logging
from functools import cache
from math import inf
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, unknown
from gossamer.kernels import build
from gossamer.kernels.sparse_conv.pack import PackedConv
from gossamer.kernels.sparse_conv.reference import sparse_conv_reference
from gossamer.kernels.sparse_linear.op import _parallel

__all__ = ["Backend", "backend_for", "instruction_set", "register", "sparse_conv"]

Backend = Literal["auto", "reference", "cpu"]

_SOURCE = Path(__file__).with_name("cpu.cpp")
_LEVELS = ("portable", "AVX2", "AVX-512")
_FAR = (1 << 31) - 1  # bytes a pointer can be moved at once


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The compiled library, and the instruction set of this machine."""
    library = build.load(_SOURCE)
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function = library.gossamer_sparse_conv
    function.argtypes = [
        *(pointer, pointer, pointer),  # values, steps, start
        *(long, long, long, number),  # blocks, outputs, inputs, block
        *(ctypes.c_float, ctypes.c_float),  # low, high
        *(pointer, pointer, long, long),  # x, y, images, positions
        *(number, number, number, number),  # last, copies, threads, level
        pointer,  # GOMP_parallel
    ]
    function.restype = None
    return library, int(library.gossamer_conv_level())


@cache
def _usable() -> bool:
    """Whether the kernel can be built here; the first failure is said in one line."""
    try:
        _library()
    except build.CannotBuild as error:
        logging.getLogger("gossamer").warning("sparse conv runs on torch operations: %s", error)
        return False
    return True


def _fits(x: Tensor, packed: PackedConv) -> bool:
    tensors = (x, packed.values, packed.steps, packed.start)
    return x.dtype == torch.float32 and all(t.device.type == "cpu" for t in tensors)


def backend_for(x: Tensor, packed: PackedConv) -> Literal["reference", "cpu"]:
    """What ``auto`` runs for an input and a matrix."""
    return "cpu" if _fits(x, packed) and _usable() else "reference"


def instruction_set() -> str:
    """What the cpu backend runs on here: portable, AVX2 or AVX-512.

    Raises
    ------
    CannotBuild
        If the kernel cannot be compiled.
    """
    return _LEVELS[_library()[1]]


def sparse_conv(
    x: Tensor,
    packed: PackedConv,
    low: float = -inf,
    high: float = inf,
    backend: Backend = "auto",
    level: int | None = None,
) -> Tensor:
    """Clamp of W x + bias at every position, reading only the weights that are stored.

    On ``auto``, gradients flow to x; the packed weights and the bias are constants.

    Parameters
    ----------
    x : (N, I, ...), for images (N, I, H, W), channels in rows. Memory with channels side by side
        (``torch.channels_last``, NHWC) is transposed strip by strip on its way in.
    packed : W, (O, I), with its bias.
    low, high : bounds of the result; 0 and 6 are ReLU6.
    backend : ``auto``, ``reference``, or ``cpu``, which raises where it cannot run.
    level : instruction set of backend cpu, 0 portable, 1 AVX2, 2 AVX-512; the best when left out.

    Returns
    -------
    (N, O, ...), contiguous, dtype of x. The same bits for any number of threads; threads are
    torch's, ``torch.get_num_threads()`` of them.

    Raises
    ------
    GossamerError
        If x does not have I channels, low exceeds high, or a backend or level cannot run.
    """
    if x.dim() < 2 or x.shape[1] != packed.shape[1]:
        raise GossamerError(
            f"this convolution takes (N, {packed.shape[1]}, ...); got {tuple(x.shape)}"
        )
    if not low <= high:
        raise GossamerError(f"the result is clamped to low <= high; got {low} and {high}")
    if backend not in ("auto", "reference", "cpu"):
        raise unknown("backend", backend, ("auto", "reference", "cpu"))
    if backend == "auto":
        if not _plain(x, packed):
            return torch.ops.gossamer.sparse_conv(
                x, packed.values, packed.steps, packed.start, *packed.shape, packed.block, low, high
            )
        backend = backend_for(x, packed)
    if backend == "cpu":
        return _run(x.detach(), packed, low, high, level)
    return _reference(x.detach(), packed, low, high)


def _plain(x: Tensor, packed: PackedConv) -> bool:
    """Whether neither a compiler nor autograd needs to see the operator, which costs 10 us."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is type(packed.values) is Tensor
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def _shape(x: Tensor, outputs: int) -> tuple[int, ...]:
    return (x.shape[0], outputs, *x.shape[2:])


def _reference(x: Tensor, packed: PackedConv, low: float, high: float) -> Tensor:
    flat = x.reshape(*x.shape[:2], x.shape[2:].numel())
    return sparse_conv_reference(flat, packed, low, high).view(_shape(x, packed.shape[0]))


def _run(
    x: Tensor,
    packed: PackedConv,
    low: float,
    high: float,
    level: int | None = None,
    copies: int = -1,
) -> Tensor:
    """By the kernel; ``copies`` 1 copies every strip, 0 none it can read in place."""
    if not _fits(x, packed):
        raise GossamerError(
            f"backend cpu of sparse conv takes float32 in main memory; got {x.dtype} on "
            f"{x.device} and weights on {packed.values.device}: use backend reference"
        )
    library, best = _library()
    if level is not None and not 0 <= level <= best:
        raise GossamerError(
            f"this machine offers levels 0 to {best} ({_LEVELS[best]}); got {level}"
        )
    last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    inputs = x if last else x.contiguous()
    values, steps, start = (t.contiguous() for t in (packed.values, packed.steps, packed.start))
    outputs, channels = packed.shape
    positions = x.shape[2:].numel()
    result = torch.empty(_shape(x, outputs))
    if 4 * channels * positions > _FAR:
        copies = 1
    library.gossamer_sparse_conv(
        values.data_ptr(),
        steps.data_ptr(),
        start.data_ptr(),
        packed.blocks,
        outputs,
        channels,
        packed.block,
        low,
        high,
        inputs.data_ptr(),
        result.data_ptr(),
        x.shape[0],
        positions,
        last,
        copies,
        torch.get_num_threads(),
        best if level is None else level,
        _parallel(),
    )
    return result


@cache
def register() -> None:
    """Make ``torch.ops.gossamer.sparse_conv`` known to torch; compiles nothing."""

    def run(
        x: Tensor,
        values: Tensor,
        steps: Tensor,
        start: Tensor,
        outputs: int,
        inputs: int,
        block: int,
        low: float,
        high: float,
    ) -> Tensor:
        packed = PackedConv(values, steps, start, (outputs, inputs), block)
        function = _run if backend_for(x, packed) == "cpu" else _reference
        return function(x, packed, low, high)

    def fake(
        x: Tensor,
        values: Tensor,
        steps: Tensor,
        start: Tensor,
        outputs: int,
        inputs: int,
        block: int,
        low: float,
        high: float,
    ) -> Tensor:
        return x.new_empty(_shape(x, outputs))

    def keep(ctx, inputs: tuple, output: Tensor) -> None:
        _, values, steps, start, *ctx.numbers = inputs
        ctx.save_for_backward(values, steps, start, output)

    def backward(ctx, gradient: Tensor) -> tuple:
        outputs, inputs, block, low, high = ctx.numbers
        values, steps, start, result = ctx.saved_tensors
        dense, _ = PackedConv(values, steps, start, (outputs, inputs), block).to_dense()
        flat = (gradient * ((result > low) & (result < high))).flatten(2)
        back = torch.einsum("oi,nop->nip", dense.to(flat.dtype), flat)
        return back.view(gradient.shape[0], inputs, *gradient.shape[2:]), *[None] * 8

    operator = torch.library.custom_op("gossamer::sparse_conv", run, mutates_args=())
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=keep)
