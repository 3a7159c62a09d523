"""Attention over listed blocks of keys, and single columns: dispatch.

Backends: ``hopper`` (CUDA, compute capability 9.0, 16 bits, D = E of 64 or 128), ``triton`` (CUDA),
``reference`` (the definition, any device), and ``auto``, the first of these that takes the call.
Shapes: B = batch, H = heads, G = key-value heads, Q = queries, K = keys, C = columns,
D, E = head widths of queries and values.
"""

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, unknown
from gossamer.kernels.block_attention.reference import block_attention_reference

__all__ = ["Backend", "block_attention", "block_backend", "block_refusal", "register"]

Backend = Literal["auto", "reference", "triton", "hopper"]
Ran = Literal["reference", "triton", "hopper"]
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def _triton() -> bool:
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def block_refusal(query: Tensor, key: Tensor, value: Tensor, block: tuple[int, int]) -> str | None:
    """Why no kernel takes a call, or None."""
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
    if block[0] % 64 or block[1] % 64:
        return f"blocks are {block[0]} x {block[1]}; the kernel takes multiples of 64"
    if any(x.stride(3) != 1 for x in (query, key, value)):
        return "the entries of a head do not lie side by side"
    return None


def block_backend(
    query: Tensor, key: Tensor, value: Tensor, block: tuple[int, int], lists: int = 1
) -> Ran:
    """What ``auto`` runs with so many lists for every batch row."""
    if block_refusal(query, key, value, block) is not None:
        return "reference"
    from gossamer.kernels.block_attention.forward import hopper_fits

    fits = hopper_fits(query, key, value, block, max(lists, key.shape[1]))
    return "hopper" if fits else "triton"


def _choose(
    backend: Backend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: tuple[int, int],
    lists: int,
) -> Ran:
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend))
    if backend == "reference":
        return backend
    found = block_backend(query, key, value, block, lists)
    if backend == "auto" or backend == found or (backend, found) == ("triton", "hopper"):
        return found if backend == "auto" else backend
    reason = block_refusal(query, key, value, block) or (
        "it takes 16-bit types, equal head widths of 64 or 128 and strides of whole 16 bytes, on "
        "compute capability 9.0"
    )
    raise GossamerError(f"backend {backend} cannot run here: {reason}; use backend='reference'")


def _spread(x: Tensor, heads: int) -> Tensor:
    """(B or 1, heads, n) from 1, G or H lists."""
    own = x.shape[1]
    return x.expand(-1, heads, -1) if own == 1 else x.repeat_interleave(heads // own, 1)


def _check(query: Tensor, key: Tensor, value: Tensor, indptr: Tensor, block: tuple[int, int]):
    batch, heads, queries = query.shape[:3]
    shared = key.shape[1]
    if heads % shared:
        raise GossamerError(f"{heads} query heads do not divide into {shared} key-value heads")
    if key.shape[:3] != value.shape[:3] or len(key) != batch or key.shape[3] != query.shape[3]:
        raise GossamerError(
            f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)} do not fit"
        )
    rows = -(-queries // block[0])
    if indptr.dim() != 3 or indptr.shape[2] != rows + 1:
        raise GossamerError(
            f"indptr of {rows} query blocks is (batch, heads, {rows + 1}); got "
            f"{tuple(indptr.shape)}"
        )


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indptr: Tensor,
    indices: Tensor,
    block: tuple[int, int],
    *,
    scale: float | None = None,
    columns: Tensor | None = None,
    first: Tensor | None = None,
    query_offset: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Attention that reads, for every block of queries, only its listed blocks of keys.

    Parameters
    ----------
    query : (B, H, Q, D). key : (B, G, K, D). value : (B, G, K, E), of any strides.
    indptr : int, (B or 1, 1 or G or H, ceil(Q / bq) + 1), offsets into ``indices``.
    indices : int, key blocks, ascending within a query block and each once.
    block : (bq, bk), queries and keys of a block; blocks start at the first query and key.
    scale : on the scores; D ** -0.5 when left out.
    columns : int, (B or 1, 1 or G or H, C), single keys every query may read besides, ascending
        and each once, padded at the end with -1. A column inside a listed block counts once.
    first : int, (B,), index of the first real key of each row (left padding).
    query_offset : key that the first query stands at.
    window : latest keys a query sees, its own included.
    softcap : scores become ``softcap * tanh(score / softcap)``.
    sinks : (H,), scores that take part in the softmax and have no value.
    causal : no query reads a key after it.

    Returns
    -------
    (B, H, Q, E); queries that read nothing give zeros. The kernels sum in float32.

    Raises
    ------
    GossamerError
        On shapes that do not fit, or a named backend that cannot run.
    """
    _check(query, key, value, indptr, block)
    lists = max(indptr.shape[1], key.shape[1], 1 if columns is None else columns.shape[1])
    chosen = _choose(backend, query, key, value, block, lists)
    options = {
        "query_offset": query_offset,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "causal": causal,
    }
    if chosen == "reference":
        return block_attention_reference(
            *(query, key, value, indptr, indices, block),
            **options,
            scale=scale,
            columns=columns,
            first=first,
        )
    from gossamer.kernels.block_attention.forward import Lists, forward

    found = Lists(
        indptr=_spread(indptr, lists),
        indices=indices.to(torch.int32).contiguous(),
        block=block,
        columns=None
        if columns is None or columns.shape[2] == 0
        else _spread(columns, lists).to(torch.int32),
        first=None if first is None else first.to(torch.int32).expand(len(query)).contiguous(),
    )
    used = query.shape[3] ** -0.5 if scale is None else scale
    return forward(query, key, value, found, **options, scale=used, hopper=chosen == "hopper")


# -- what compilers see ---------------------------------------------------------------------------


@cache
def register() -> None:
    """Make ``torch.ops.gossamer.block_attention`` known to torch; it gives (B, Q, H, E)."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        indptr: Tensor,
        indices: Tensor,
        block: list[int],
        scale: float | None,
        columns: Tensor | None,
        first: Tensor | None,
        query_offset: int,
        softcap: float | None,
        sinks: Tensor | None,
        causal: bool,
    ) -> Tensor:
        out = block_attention(
            *(query, key, value, indptr, indices, (block[0], block[1])),
            scale=scale,
            columns=columns,
            first=first,
            query_offset=query_offset,
            softcap=softcap,
            sinks=sinks,
            causal=causal,
        )
        return out.transpose(1, 2).contiguous()

    def fake(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        indptr: Tensor,
        indices: Tensor,
        block: list[int],
        scale: float | None,
        columns: Tensor | None,
        first: Tensor | None,
        query_offset: int,
        softcap: float | None,
        sinks: Tensor | None,
        causal: bool,
    ) -> Tensor:
        batch, heads, queries, _ = query.shape
        return query.new_empty(batch, queries, heads, value.shape[3])

    operator = torch.library.custom_op("gossamer::block_attention", run, mutates_args=())
    operator.register_fake(fake)
