"""The operator ``gossamer::nm_mask``: which ``keep`` entries of every group stay.

Backends: ``cpu`` (C++, compiled on first use), ``reference`` (the definition), and ``auto``,
which takes ``cpu`` for float tensors in main memory when it can be built, else the reference.
"""

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, unknown
from gossamer.core.rank import check_scores
from gossamer.kernels import build
from gossamer.kernels.nm_select.reference import nm_mask_reference

__all__ = ["Backend", "backend_for", "instruction_set", "nm_mask", "register"]

Backend = Literal["auto", "reference", "cpu"]

_SOURCE = Path(__file__).with_name("cpu.cpp")
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_LEVELS = ("portable", "AVX2", "AVX-512")


@cache
def _functions() -> tuple[Callable[..., int], int]:
    """The compiled function, and the instruction set of this machine."""
    library = build.load(_SOURCE)
    function = library.gossamer_nm_mask
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_int] * 5]
    function.restype = ctypes.c_int
    return function, int(library.gossamer_nm_level())


@cache
def _usable() -> bool:
    """Whether the kernel can be built here; the first failure is said in one line."""
    try:
        _functions()
    except build.CannotBuild as error:
        logging.getLogger("gossamer").warning("N:M selection runs on torch operations: %s", error)
        return False
    return True


def backend_for(groups: Tensor) -> Literal["reference", "cpu"]:
    """What ``auto`` runs for a tensor."""
    fits = groups.device.type == "cpu" and groups.dtype in _DTYPES
    return "cpu" if fits and _usable() else "reference"


def instruction_set() -> str:
    """What the cpu backend runs on here: portable, AVX2 or AVX-512.

    Raises
    ------
    CannotBuild
        If the kernel cannot be compiled.
    """
    return _LEVELS[_functions()[1]]


def nm_mask(
    groups: Tensor, keep: int, backend: Backend = "auto", level: int | None = None
) -> Tensor:
    """Keep the ``keep`` largest entries of each group, ties to the lower index.

    Parameters
    ----------
    groups : (G, M), one group a row.
    keep : 0 < keep <= M.
    backend : ``auto``, ``reference``, or ``cpu``, which raises where it cannot run.
    level : instruction set of the cpu backend, 0 portable, 1 AVX2, 2 AVX-512; the best when
        left out.

    Returns
    -------
    bool, (G, M).

    Raises
    ------
    GossamerError
        On NaN, keep outside its range, or a named backend that cannot run.
    """
    if groups.dim() != 2 or not 0 < keep <= groups.shape[1]:
        raise GossamerError(
            f"N:M selection takes (groups, M) and 0 < keep <= M; got {tuple(groups.shape)}, {keep}"
        )
    if backend not in ("auto", "reference", "cpu"):
        raise unknown("backend", backend, ("auto", "reference", "cpu"))
    chosen = backend_for(groups) if backend == "auto" else backend
    if chosen == "reference" or keep == groups.shape[1]:
        return nm_mask_reference(groups, keep)
    return _run(groups, keep, level)


def _run(groups: Tensor, keep: int, level: int | None) -> Tensor:
    if groups.device.type != "cpu" or groups.dtype not in _DTYPES:
        raise GossamerError(
            f"backend cpu of N:M selection takes float tensors in main memory; got "
            f"{groups.dtype} on {groups.device}: use backend reference"
        )
    function, best = _functions()
    if level is not None and not 0 <= level <= best:
        raise GossamerError(
            f"this machine offers levels 0 to {best} ({_LEVELS[best]}); got {level}"
        )
    scores = groups.detach().contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool)
    found_nan = function(
        scores.data_ptr(),
        mask.data_ptr(),
        scores.shape[0],
        scores.shape[1],
        keep,
        _DTYPES[scores.dtype],
        torch.get_num_threads(),
        best if level is None else level,
    )
    if found_nan:
        check_scores(scores)  # Says how many, in the words of the whole package.
    return mask


@cache
def register() -> None:
    """Make ``torch.ops.gossamer.nm_mask(groups, keep)`` known to torch; compiles nothing."""

    def run(groups: Tensor, keep: int) -> Tensor:
        return nm_mask(groups, keep)

    def fake(groups: Tensor, keep: int) -> Tensor:
        return groups.new_empty(groups.shape, dtype=torch.bool)

    operator = torch.library.custom_op("gossamer::nm_mask", run, mutates_args=())
    operator.register_fake(fake)
