"""The C interface: structures as cpu.cpp has them, and the compiled library.

A structure points into tensors; whoever holds one holds them too (``keep``).
"""

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.kernels import build
from gossamer.kernels.gather_gemv.rows import DTYPES, Rows

__all__ = [
    "ACTS",
    "LEVELS",
    "MOST",
    "Block",
    "Cache",
    "Linear",
    "Mlp",
    "Model",
    "Native",
    "library",
    "linear_of",
    "mlp_of",
    "pool",
    "usable",
]

LEVELS = ("portable", "AVX2", "AVX-512")
ACTS = ("silu", "relu", "gelu", "gelu_tanh", "relu2", "none")
MOST = 4  # x that one call takes

_SOURCE = Path(__file__).with_name("cpu.cpp")
_P, _L, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Linear(ctypes.Structure):
    """GossamerLinear."""

    _fields_ = [
        *((name, _P) for name in ("weight", "scale", "bias", "cut")),
        *((name, _L) for name in ("inner", "outer", "cuts", "dtype", "channel_major")),
        ("seen", _P),
    ]


class Mlp(ctypes.Structure):
    """GossamerMlp."""

    _fields_ = [
        *((name, Linear) for name in ("gate", "up", "down")),
        ("mid", _P),
        ("mids", _L),
        ("act", _L),
        ("seen", _P),
    ]


class Block(ctypes.Structure):
    """GossamerBlock."""

    _fields_ = [
        *((name, Linear) for name in ("q", "k", "v", "o")),
        ("mlp", Mlp),
        *((name, _P) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
    ]


class Model(ctypes.Structure):
    """GossamerModel."""

    _fields_ = [
        *(
            (name, _L)
            for name in (
                *("blocks", "hidden", "heads", "kv_heads"),
                *("head_dim", "rotary", "cache_dtype"),
            )
        ),
        ("block", ctypes.POINTER(Block)),
        ("final_norm", _P),
        ("epsilon", ctypes.c_double),
        ("scaling", ctypes.c_double),
    ]


class Cache(ctypes.Structure):
    """GossamerCache."""

    _fields_ = [("keys", _P), ("values", _P), ("batch_stride", _L), ("head_stride", _L)]


@dataclass(frozen=True, eq=False)
class Native:
    """A structure together with the tensors it points into."""

    struct: Any
    keep: tuple[Tensor, ...]


@cache
def library() -> tuple[ctypes.CDLL, int]:
    """The compiled library, and the instruction set of this machine.

    Raises
    ------
    CannotBuild
        If it cannot be compiled here.
    """
    found = build.load(_SOURCE)
    last = (_N, _N, _P)  # threads, level, GOMP_parallel
    signatures: dict[str, tuple[Any, ...]] = {
        "linear": (_P, _P, _P, _L, _P, *last),
        "index": (_P, _P, _P, _L, _L, _P, *last),
        "mlp": (_P, _P, _P, _L, _P, *last),
        "step": (_P, _P, _P, _P, _P, _L, _P, _P, _L, _P, *last),
        "stream": (_P, _L, _N),
    }
    for name, arguments in signatures.items():
        function = getattr(found, f"gossamer_gather_{name}")
        function.argtypes, function.restype = list(arguments), None
    found.gossamer_gather_stream.restype = ctypes.c_float
    assert found.gossamer_gather_most() == MOST
    return found, int(found.gossamer_gather_level())


@cache
def usable() -> bool:
    """Whether the kernels can be built here; the first failure is said in one line."""
    try:
        library()
    except build.CannotBuild as error:
        logging.getLogger("gossamer").warning("gathered products run on torch: %s", error)
        return False
    return True


@cache
def pool() -> int | None:
    """The address of ``GOMP_parallel`` in torch's own thread pool; None: threads of our own."""
    folder = Path(torch.__file__).parent
    beside = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    for name in [None, *map(str, beside)]:
        try:
            found = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value
    return None


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def linear_of(rows: Rows, cut: Tensor | None = None, seen: Tensor | None = None) -> Native:
    """A layer with its threshold.

    Parameters
    ----------
    cut : float32, (1,) or (I,), or None. seen : int64 (2,), counts channels read and channels.
    """
    cut = None if cut is None else cut.detach().float().cpu().contiguous()
    struct = Linear(
        *(_at(rows.weight), _at(rows.scale), _at(rows.bias), _at(cut)),
        *(rows.in_features, rows.out_features, 0 if cut is None else cut.numel()),
        *(DTYPES.index(rows.weight.dtype), int(rows.major == "channel"), _at(seen)),
    )
    held = (rows.weight, rows.scale, rows.bias, cut, seen)
    return Native(struct, tuple(t for t in held if t is not None))


def mlp_of(
    gate: Native | None,
    up: Native,
    down: Native,
    act: str,
    mid: Tensor | None = None,
    seen: Tensor | None = None,
) -> Native:
    """An MLP of layers made by :func:`linear_of`; with ``mid``, up must be output-major."""
    mid = None if mid is None else mid.detach().float().cpu().contiguous()
    struct = Mlp(
        *(Linear() if gate is None else gate.struct, up.struct, down.struct),
        *(_at(mid), 0 if mid is None else mid.numel(), ACTS.index(act), _at(seen)),
    )
    parts = [part.keep for part in (gate, up, down) if part is not None]
    own = tuple(t for t in (mid, seen) if t is not None)
    return Native(struct, tuple(t for part in parts for t in part) + own)
