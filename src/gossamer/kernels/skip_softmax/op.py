"""Attention that skips tiles far below the largest score: dispatch.

Backends: ``triton`` (CUDA), ``reference`` (the definition, a loop over tiles), ``auto``.
Shapes: B = batch, H = heads, G = key-value heads, Q = queries, K = keys, D, E = head widths of
queries and values.
"""

import math
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, unknown
from gossamer.kernels.skip_softmax.reference import skip_decode_reference, skip_reference

__all__ = ["Backend", "skip_refusal", "skip_softmax", "skip_softmax_decode"]

Backend = Literal["auto", "reference", "triton"]
_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG2E = 1.4426950408889634


@cache
def _triton() -> bool:
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def skip_refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels do not take a call, or None."""
    if query.device.type != "cuda":
        return f"the tensors are on {query.device}; the kernel needs CUDA"
    if not _triton():
        return "triton is not installed"
    if query.dtype not in _TYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return (
            f"queries, keys and values are {query.dtype}, {key.dtype} and {value.dtype}; the "
            "kernel takes one of bfloat16, float16 and float32"
        )
    if max(query.shape[3], value.shape[3]) > 256:
        return f"heads are {query.shape[3]} and {value.shape[3]} wide; the kernel takes up to 256"
    if any(x.stride(3) != 1 for x in (query, key, value)):
        return "the entries of a head do not lie side by side"
    return None


def _runs(backend: Backend, reason: str | None) -> bool:
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend))
    if backend == "triton" and reason is not None:
        raise GossamerError(f"backend triton cannot run here: {reason}; use backend='reference'")
    return backend != "reference" and reason is None


def _check(query: Tensor, key: Tensor, value: Tensor, threshold: float) -> None:
    if not 0.0 <= threshold <= 1.0:
        raise GossamerError(f"threshold is {threshold}; give a share of the largest weight, 0 to 1")
    if (
        query.shape[1] % key.shape[1]
        or key.shape[:3] != value.shape[:3]
        or len(key) != len(query)
        or key.shape[3] != query.shape[3]
    ):
        raise GossamerError(
            f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)} do not fit"
        )


def _first(first: Tensor | None, query: Tensor) -> Tensor:
    if first is None:
        return torch.zeros(1, dtype=torch.int32, device=query.device)
    return first.to(torch.int32).expand(len(query)).contiguous()


def skip_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float,
    *,
    scale: float | None = None,
    query_offset: int = 0,
    first: Tensor | None = None,
    softcap: float | None = None,
    tile: tuple[int, int] = (128, 128),
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention that leaves out tiles whose weights are all below a share of the largest.

    A tile of scores is skipped when, in every row, its largest score lies below the largest seen
    so far by more than -ln(threshold). Tiles are visited in a fixed order: the first one, those on
    the diagonal, which are never skipped, then the rest by place.

    Parameters
    ----------
    query : (B, H, Q, D). key : (B, G, K, D). value : (B, G, K, E), of any strides.
    threshold : 0 skips nothing. Weights lost in a skipped tile are below ``threshold`` each,
        relative to the largest of their row.
    scale : on the scores; D ** -0.5 when left out. query_offset : key of the first query.
    first : int, (B,), the first real key of each row. softcap : as in ``block_attention``.
    tile : queries and keys of a tile, powers of 2 of at least 16.

    Returns
    -------
    out : (B, H, Q, E). count : int32, (B, H, query tiles, 2), tiles skipped and tiles in all.

    Source: arXiv:2512.12087, section 3.
    Departs from the paper: the first tile and the diagonal are visited before the others.

    Raises
    ------
    GossamerError
        On shapes that do not fit, a threshold outside 0 to 1, or if backend triton cannot run.
    """
    _check(query, key, value, threshold)
    if query_offset < 0 or query_offset + query.shape[2] > key.shape[2]:
        raise GossamerError(
            f"{query.shape[2]} queries from key {query_offset} on need as many keys; got "
            f"{key.shape[2]}"
        )
    options: dict[str, Any] = {"query_offset": query_offset, "softcap": softcap, "tile": tile}
    if not _runs(backend, skip_refusal(query, key, value)):
        return skip_reference(query, key, value, threshold, scale=scale, first=first, **options)
    from gossamer.kernels.skip_softmax.flash import prefill

    return prefill(
        *(query, key, value),
        cut=math.log2(threshold) if threshold > 0 else -math.inf,
        factor=(query.shape[3] ** -0.5 if scale is None else scale) * _LOG2E,
        first=None if first is None else _first(first, query),
        **options,
    )


def skip_softmax_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float,
    *,
    end: int | None = None,
    scale: float | None = None,
    first: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tile: int = 64,
    splits: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`skip_softmax` for one token, the keys split over programs.

    Every split starts from the largest score of the first and of the last tile, then follows its
    own; splits share no more than that, which skips fewer tiles than one walk would.

    Parameters
    ----------
    query : (B, H, 1, D). end : keys that exist (a static cache is longer).
    sinks : (H,), scores that take part in the softmax and have no value.
    splits : of the keys; as many as keep the device busy when left out (1 in the reference).

    Returns
    -------
    out : (B, H, 1, E). count : int32, (B, G, splits, 2), tiles skipped and tiles in all.

    Raises
    ------
    GossamerError
        As for :func:`skip_softmax`.
    """
    _check(query, key, value, threshold)
    if query.shape[2] != 1:
        raise GossamerError(f"decoding takes one query a row; got {query.shape[2]}")
    if end is not None:
        key, value = key[:, :, :end], value[:, :, :end]
    options: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "tile": tile}
    if not _runs(backend, skip_refusal(query, key, value)):
        return skip_decode_reference(
            *(query, key, value, threshold), scale=scale, first=first, splits=splits or 1, **options
        )
    from gossamer.kernels.skip_softmax.flash import decode

    return decode(
        *(query, key, value),
        cut=math.log2(threshold) if threshold > 0 else -math.inf,
        factor=(query.shape[3] ** -0.5 if scale is None else scale) * _LOG2E,
        first=None if first is None else _first(first, query),
        splits=splits,
        **options,
    )
