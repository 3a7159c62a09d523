"""The gathered products: ``axpy_gemv``, ``dot_gemv`` and the gated MLP built of them.

Backends: ``cpu`` (C++, compiled on first use), ``triton`` (CUDA), ``reference`` (the definition),
and ``auto``, which takes the kernel of the device where it fits, else the reference. Kernels take
one to four rows of x; more rows are the reference's, a dense product, which is said once.
"""

import ctypes
import logging
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, unknown
from gossamer.kernels.gather_gemv import native
from gossamer.kernels.gather_gemv.native import LEVELS, MOST, Native, linear_of
from gossamer.kernels.gather_gemv.reference import axpy_reference, dot_reference, mlp_reference
from gossamer.kernels.gather_gemv.rows import Rows

__all__ = [
    "Backend",
    "axpy_gemv",
    "backend_for",
    "dot_gemv",
    "gated_mlp",
    "instruction_set",
    "register",
    "run_linear",
    "run_mlp",
    "stream_rate",
]

Backend = Literal["auto", "reference", "cpu", "triton"]
_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _say_once(rows: int) -> None:
    logging.getLogger("gossamer").warning(
        "gathered products take 1 to %d rows; got %d, which run dense", MOST, rows
    )


def instruction_set() -> str:
    """What the cpu backend runs on here: portable, AVX2 or AVX-512.

    Raises
    ------
    CannotBuild
        If the kernel cannot be compiled.
    """
    return LEVELS[native.library()[1]]


def backend_for(x: Tensor, layer: Rows) -> Literal["reference", "cpu", "triton"]:
    """What ``auto`` runs for an input (B, I) and a layer."""
    if x.dtype not in _INPUTS or x.device != layer.weight.device:
        return "reference"
    kind = x.device.type
    if kind == "cuda" and layer.scale is None and _triton():
        return "triton"
    if kind != "cpu" or not native.usable():
        return "reference"
    if not 1 <= len(x) <= MOST:
        if len(x) > MOST:
            _say_once(len(x))
        return "reference"
    return "cpu"


@cache
def _triton() -> bool:
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def _choose(backend: Backend, x: Tensor, layer: Rows) -> str:
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend))
    if x.dim() != 2 or x.shape[1] != layer.in_features:
        raise GossamerError(
            f"this layer takes (rows, {layer.in_features}) inputs; got {tuple(x.shape)}"
        )
    found = backend_for(x, layer)
    if backend in ("auto", found) or backend == "reference":
        return found if backend == "auto" else backend
    raise GossamerError(
        f"backend {backend} takes 1 to {MOST} rows of float32, bfloat16 or float16 on the layer's "
        f"device; got {tuple(x.shape)} {x.dtype} on {x.device} and {layer.weight.dtype} weights on "
        f"{layer.weight.device}: use backend reference"
    )


def axpy_gemv(
    x: Tensor,
    layer: Rows,
    cut: Tensor | None = None,
    index: Tensor | None = None,
    *,
    backend: Backend = "auto",
    level: int | None = None,
) -> Tensor:
    """W x + bias over the active input channels, reading only their rows of Wᵀ.

    Parameters
    ----------
    x : (B, I). A channel is active for all rows if it is for one (the union); a row that drops it
        still counts it as 0.
    layer : channel-major.
    cut : float32, (1,) or (I,): channel j of a row is active iff not |x_j| <= cut_j, so NaN and
        infinity are; None: all are.
    index : int, (K,), the channels instead of a threshold, each at most once; for these x is
        taken as it is.
    level : instruction set of backend cpu, 0 portable, 1 AVX2, 2 AVX-512; the best when left out.

    Returns
    -------
    (B, O), dtype of x. Sums are float32, in the order of the channels whatever the threads.

    Raises
    ------
    GossamerError
        On shapes that do not fit, an index outside, or a named backend or level that cannot run.
    """
    if layer.major != "channel":
        raise GossamerError("axpy takes channel-major rows; store the layer with major='channel'")
    chosen = _choose(backend, x, layer)
    _check_cut(cut, layer.in_features)
    _check_index(index, layer.in_features)
    if chosen == "reference":
        return axpy_reference(x, layer, cut, index)
    if chosen == "triton":
        from gossamer.kernels.gather_gemv.triton_gemv import axpy_triton

        return axpy_triton(x, layer, cut, index)
    if index is not None:
        return _run_index(x, layer, index, layer.out_features, level)
    return run_linear(linear_of(layer, cut), x, layer.out_features, level=level)


def dot_gemv(
    x: Tensor,
    layer: Rows,
    index: Tensor,
    *,
    backend: Backend = "auto",
    level: int | None = None,
) -> Tensor:
    """The given outputs of W x + bias, reading only their rows of W.

    Parameters
    ----------
    x : (B, I). layer : output-major. index : int, (K,), the outputs.

    Returns
    -------
    (B, K), dtype of x.

    Raises
    ------
    GossamerError
        As for :func:`axpy_gemv`.
    """
    if layer.major != "output":
        raise GossamerError("dot takes output-major rows; store the layer with major='output'")
    chosen = _choose(backend, x, layer)
    _check_index(index, layer.out_features)
    if chosen == "reference":
        return dot_reference(x, layer, index)
    if chosen == "triton":
        from gossamer.kernels.gather_gemv.triton_gemv import dot_triton

        return dot_triton(x, layer, index)
    return _run_index(x, layer, index, len(index), level)


def gated_mlp(
    x: Tensor,
    gate: Rows | None,
    up: Rows,
    down: Rows,
    *,
    act: str = "silu",
    cuts: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    mid: Tensor | None = None,
    backend: Backend = "auto",
    level: int | None = None,
) -> Tensor:
    """W_d(act(W_g x) ⊙ W_u x) in one native call, reading only what the thresholds leave.

    Parameters
    ----------
    x : (B, H).
    gate : None for W_d act(W_u x). down : channel-major.
    act : one of silu, relu, gelu, gelu_tanh, relu2, none.
    cuts : thresholds on the inputs of gate, up and down, see :func:`axpy_gemv`; the input of an
        output-major layer is zeroed by its threshold, and every weight read.
    mid : threshold on act(W_g x): the rows of W_u (output-major then) and of W_dᵀ of inactive
        neurons are not read.

    Raises
    ------
    GossamerError
        As for :func:`axpy_gemv`.
    """
    if act not in native.ACTS:
        raise unknown("activation", act, native.ACTS)
    if down.major != "channel" or (mid is not None and (gate is None or up.major != "output")):
        raise GossamerError(
            "a gated MLP has a channel-major down and, where mid is given, a gate and an "
            "output-major up"
        )
    for cut, layer in zip(cuts, (gate, up, down), strict=True):
        _check_cut(cut, layer.in_features if layer is not None else 0)
    _check_cut(mid, up.out_features)
    chosen = _choose(backend, x, up)
    if chosen == "cpu":
        first, *others = (
            None if layer is None else linear_of(layer, cut)
            for layer, cut in zip((gate, up, down), cuts, strict=True)
        )
        assert others[0] is not None
        assert others[1] is not None
        made = native.mlp_of(first, others[0], others[1], act, mid)
        return run_mlp(made, x, down.out_features, level=level)
    return mlp_reference(x, gate, up, down, act=act, cuts=cuts, mid=mid)


def _check_cut(cut: Tensor | None, size: int) -> None:
    if cut is not None and tuple(cut.shape) not in ((1,), (size,)):
        raise GossamerError(f"a threshold has shape (1,) or ({size},); got {tuple(cut.shape)}")


def _check_index(index: Tensor | None, size: int) -> None:
    if index is None:
        return
    if index.dim() != 1 or index.is_floating_point():
        raise GossamerError(f"an index is a list of whole numbers; got {tuple(index.shape)}")
    # A look at values would stop a GPU; there the kernel leaves out what lies outside.
    if index.device.type == "cpu" and len(index):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            raise GossamerError(
                f"the index reaches {low} to {high}; this layer has 0 to {size - 1}"
            )


# -- the cpu backend ------------------------------------------------------------------------------


def _level(level: int | None) -> int:
    best = native.library()[1]
    if level is not None and not 0 <= level <= best:
        raise GossamerError(f"this machine offers levels 0 to {best} ({LEVELS[best]}); got {level}")
    return best if level is None else level


def _row_flags(dense: Tensor | None) -> Tensor | None:
    return None if dense is None else dense.to(torch.uint8).contiguous()


def run_linear(
    layer: Native, x: Tensor, out: int, dense: Tensor | None = None, level: int | None = None
) -> Tensor:
    """(B, O) by a prepared layer; ``dense`` (B,) marks rows that keep every channel."""
    inputs = x.to(torch.float32).contiguous()
    result = torch.empty(len(inputs), out)
    flags = _row_flags(dense)
    native.library()[0].gossamer_gather_linear(
        *(ctypes.byref(layer.struct), inputs.data_ptr()),
        *(None if flags is None else flags.data_ptr(), len(inputs), result.data_ptr()),
        *(torch.get_num_threads(), _level(level), native.pool()),
    )
    return result.to(x.dtype)


def run_mlp(
    mlp: Native, x: Tensor, out: int, dense: Tensor | None = None, level: int | None = None
) -> Tensor:
    """(B, H) by a prepared MLP."""
    inputs = x.to(torch.float32).contiguous()
    result = torch.empty(len(inputs), out)
    flags = _row_flags(dense)
    native.library()[0].gossamer_gather_mlp(
        *(ctypes.byref(mlp.struct), inputs.data_ptr()),
        *(None if flags is None else flags.data_ptr(), len(inputs), result.data_ptr()),
        *(torch.get_num_threads(), _level(level), native.pool()),
    )
    return result.to(x.dtype)


def _run_index(x: Tensor, layer: Rows, index: Tensor, out: int, level: int | None) -> Tensor:
    inputs = x.to(torch.float32).contiguous()
    result = torch.empty(len(inputs), out)
    at = index.to(torch.int32).contiguous()
    made = linear_of(layer)
    native.library()[0].gossamer_gather_index(
        *(ctypes.byref(made.struct), inputs.data_ptr(), at.data_ptr(), len(at), len(inputs)),
        *(result.data_ptr(), torch.get_num_threads(), _level(level), native.pool()),
    )
    return result.to(x.dtype)


def stream_rate(data: Tensor, repeats: int = 5, level: int | None = None) -> float:
    """GB/s that one thread reads from a float32 tensor of several caches, the best of some tries.

    Raises
    ------
    CannotBuild
        If the kernel cannot be compiled.
    """
    import time

    found, best = native.library()[0], float("inf")
    flat = data.contiguous().view(-1)
    for _ in range(repeats):
        begin = time.perf_counter()
        found.gossamer_gather_stream(flat.data_ptr(), flat.numel(), _level(level))
        best = min(best, time.perf_counter() - begin)
    return flat.nbytes / best / 1e9


# -- what compilers see ---------------------------------------------------------------------------


def _named(weight: Tensor, scale: Tensor | None, bias: Tensor | None, major: Any) -> Rows:
    return Rows(weight, scale, bias, major)


@cache
def register() -> None:
    """Make ``torch.ops.gossamer.axpy_gemv`` and ``dot_gemv`` known to torch; compiles nothing."""

    def axpy(
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        cut: Tensor | None,
        index: Tensor | None,
    ) -> Tensor:
        return axpy_gemv(x, _named(weight, scale, bias, "channel"), cut, index)

    def axpy_fake(
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        cut: Tensor | None,
        index: Tensor | None,
    ) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[1])

    def dot(
        x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, index: Tensor
    ) -> Tensor:
        return dot_gemv(x, _named(weight, scale, bias, "output"), index)

    def dot_fake(
        x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, index: Tensor
    ) -> Tensor:
        return x.new_empty(x.shape[0], index.shape[0])

    torch.library.custom_op("gossamer::axpy_gemv", axpy, mutates_args=()).register_fake(axpy_fake)
    torch.library.custom_op("gossamer::dot_gemv", dot, mutates_args=()).register_fake(dot_fake)
