"""Kernels that choose keys: dispatch. ``triton`` (CUDA), ``reference`` (any device), ``auto``.

Shapes: B = batch, H = heads, G = key-value heads, R = H / G, W = last queries, K = keys,
T = tokens, D = head width.
"""

from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError, unknown
from gossamer.kernels.attention_select.reference import (
    UNIT,
    block_means_reference,
    last_mass_reference,
    mass_cut_reference,
)

__all__ = ["LOG2E", "Backend", "block_means", "last_mass", "mass_cut", "runs", "select_refusal"]

Backend = Literal["auto", "reference", "triton"]
_TYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2E = 1.4426950408889634

_ONE_PROGRAM = 1 << 17
"""Entries of a row that one program cuts: up to so many, further launches would cost more."""


@cache
def _triton() -> bool:
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


@cache
def _nothing(device: torch.device) -> Tensor:
    """Stands for an argument that is not used."""
    return torch.zeros(1, device=device, dtype=torch.int32)


def select_refusal(
    *tensors: Tensor,
    queries: int = 0,
    wide: bool = True,
    types: tuple[torch.dtype, ...] = _TYPES,
) -> str | None:
    """Why the kernels do not take tensors (B, H, T, D), or so many last queries; or None.

    Parameters
    ----------
    wide : the last dimension is a head's. types : what the kernel reads.
    """
    if any(x.device.type != "cuda" for x in tensors):
        return f"the tensors are on {tensors[0].device}; the kernel needs CUDA"
    if not _triton():
        return "triton is not installed"
    if any(x.dtype not in types or x.dtype != tensors[0].dtype for x in tensors):
        kinds = " and ".join(sorted({str(x.dtype) for x in tensors}))
        known = ", ".join(str(x) for x in types)
        return f"the tensors are {kinds}; the kernel takes one of {known}"
    if not wide:
        return None
    if any(x.shape[-1] > 256 for x in tensors):
        return f"heads are {tensors[0].shape[-1]} wide; the kernel takes up to 256"
    if queries > 128:
        return f"there are {queries} last queries; the kernel takes up to 128"
    if any(x.stride(-1) != 1 for x in tensors):
        return "the entries of a head do not lie side by side"
    return None


def runs(backend: Backend, reason: str | None) -> bool:
    """Whether the Triton kernels run, given why they cannot.

    Raises
    ------
    GossamerError
        On an unknown backend, or if backend triton cannot run.
    """
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend))
    if backend == "triton" and reason is not None:
        raise GossamerError(f"backend triton cannot run here: {reason}; use backend='reference'")
    return backend != "reference" and reason is None


def last_mass(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    first: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Share of the last queries' attention that each key, and each distance, receives.

    Parameters
    ----------
    query : (B, H, W, D), the last W queries; the last stands at the last key.
    key : (B, G, K, D). scale : on the scores; D ** -0.5 when left out.
    softcap : scores become ``softcap * tanh(score / softcap)``.
    first : int, (B,), the first real key of each row.

    Returns
    -------
    vertical, slash : (B, G, K) float32, by key and by distance, the mean over queries and over
        the heads that share keys. Each sums to 1. No W x K scores are stored.

    Raises
    ------
    GossamerError
        On more queries than keys, or if backend triton cannot run.
    """
    (batch, heads, count, width), (_, shared, keys, _) = query.shape, key.shape
    if heads % shared or not 1 <= count <= keys:
        raise GossamerError(
            f"queries {tuple(query.shape)} are not the last ones of keys {tuple(key.shape)}"
        )
    if not runs(backend, select_refusal(query, key, queries=count)):
        return last_mass_reference(query, key, scale=scale, softcap=softcap, first=first)
    import triton  # pyright: ignore[reportMissingImports]

    from gossamer.kernels.attention_select.list_kernels import slash_kernel
    from gossamer.kernels.attention_select.triton_kernels import (
        join_kernel,
        last_mass_kernel,
        last_top_kernel,
    )

    wide = max(16, triton.next_power_of_2(count))
    tiles = triton.cdiv(keys, wide)
    splits = max(1, min(triton.cdiv(tiles, 4), 128, triton.cdiv(1056, batch * heads)))
    each = triton.cdiv(tiles, splits)
    device = query.device
    stat = torch.empty(batch * heads, splits, 2, wide, device=device, dtype=torch.float32)
    vertical, near, far = (
        torch.empty(batch, shared, tiles * wide, device=device, dtype=torch.float32)
        for _ in range(3)
    )
    begin = _nothing(device)
    if first is not None:
        begin = first.to(torch.int32).expand(batch).contiguous()
    factor = (width**-0.5 if scale is None else scale) * LOG2E
    cap = 1.0 if softcap is None else softcap * LOG2E
    strides = (*query.stride()[:3], *key.stride()[:3])
    options: dict[str, Any] = {
        "R": heads // shared,
        "WP": wide,
        "DP": max(16, triton.next_power_of_2(width)),
        "HAS_FIRST": first is not None,
        "SOFTCAP": softcap is not None,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": 8 if wide >= 64 else 4,
    }
    top: Any = last_top_kernel
    top[(splits, batch * heads)](
        *(query, key, begin, stat, factor, cap, *strides, heads, keys, count, width, each),
        **options,
        num_stages=3 if wide <= 64 else 2,
    )
    whole = torch.empty(batch * heads, 2, wide, device=device, dtype=torch.float32)
    join: Any = join_kernel
    join[(batch * heads, wide // 16)](
        *(stat, whole, splits), WP=wide, SP=triton.next_power_of_2(splits), N=16, num_warps=4
    )
    mass: Any = last_mass_kernel
    mass[(tiles, batch * shared)](
        *(query, key, begin, whole, vertical, near, far, factor, cap, *strides),
        *(shared, keys, count, width, tiles),
        **options,
        num_stages=2,
    )
    slash = torch.empty(batch, shared, keys, device=device, dtype=torch.float32)
    whole_diagonals: Any = slash_kernel
    whole_diagonals[(triton.cdiv(keys, 1024), batch * shared)](
        near, far, slash, keys, tiles * wide, count, WP=wide, N=1024, num_warps=4
    )
    return vertical[..., :keys], slash


def block_means(
    x: Tensor,
    block: int,
    *,
    first: Tensor | None = None,
    tail: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Mean of every block of tokens, in one pass; the last block may be short.

    Parameters
    ----------
    x : (B, H, T, D). block : tokens of a block. first : int, (B,), the first real token of each
        row; blocks of padding alone give zeros. tail : one more mean, of the last ``block`` tokens.

    Returns
    -------
    (B, H, ceil(T / block), D) float32, or one more.
    """
    if block < 1:
        raise GossamerError(f"block is {block}; give a number of tokens, at least 1")
    if not runs(backend, select_refusal(x)):
        return block_means_reference(x, block, first, tail)
    import triton  # pyright: ignore[reportMissingImports]

    from gossamer.kernels.attention_select.triton_kernels import mean_kernel

    batch, heads, tokens, width = x.shape
    blocks = triton.cdiv(tokens, block) + tail
    out = torch.empty(batch, heads, blocks, width, device=x.device, dtype=torch.float32)
    begin = _nothing(x.device)
    if first is not None:
        begin = first.to(torch.int32).expand(batch).contiguous()
    kernel: Any = mean_kernel
    kernel[(blocks, batch * heads)](
        *(x, begin, out, *x.stride()[:3], heads, tokens, blocks, width, block),
        N=min(128, max(16, triton.next_power_of_2(block))),
        DP=triton.next_power_of_2(width),
        HAS_FIRST=first is not None,
        TAIL=tail,
        num_warps=4,
    )
    return out


def mass_cut(weights: Tensor, mass: float, *, backend: Backend = "auto") -> Tensor:
    """Mark the fewest of the largest weights that reach a mass, without sorting them.

    Parameters
    ----------
    weights : (..., n), non-negative, no NaN, sums at most 2^20. mass : above 0. Masses are
        counted in whole steps of 2^-40, so sums do not depend on their order; of equal weights
        the earlier are marked; all are where all of them do not reach the mass.

    Returns
    -------
    bool, (..., n).

    >>> mass_cut(torch.tensor([0.1, 0.6, 0.3]), 0.8)
    tensor([False,  True,  True])
    """
    if not 0.0 < mass < 2.0**20:
        raise GossamerError(f"mass is {mass}; give a share above 0")
    reason = select_refusal(weights.flatten()[:1]) if weights.numel() else "there are no weights"
    if not runs(backend, reason):
        return mass_cut_reference(weights, mass)
    import triton  # pyright: ignore[reportMissingImports]

    from gossamer.kernels.attention_select.triton_kernels import (
        equal_kernel,
        mark_kernel,
        mass_kernel,
    )

    size = weights.shape[-1]
    flat = weights.float().contiguous().view(-1, size)
    kept = torch.empty(flat.shape, device=flat.device, dtype=torch.int8)
    if size <= _ONE_PROGRAM:
        from gossamer.kernels.attention_select.list_kernels import cut_kernel

        one: Any = cut_kernel
        one[(len(flat),)](
            flat,
            kept,
            size,
            int(mass * UNIT),
            N=min(4096, max(128, triton.next_power_of_2(size))),
            num_warps=32 if size > 2048 else 4,
        )
        return kept.view(weights.shape).view(torch.bool)
    together = 1024 if size > 1024 else max(16, triton.next_power_of_2(size))
    parts = max(1, min(triton.cdiv(size, together), triton.cdiv(1056, len(flat)), 1024))
    each = triton.cdiv(triton.cdiv(size, parts), together) * together
    parts = triton.cdiv(size, each)
    found = torch.zeros(len(flat), 8, 16, device=flat.device, dtype=torch.int64)
    equal = torch.empty(len(flat), parts, device=flat.device, dtype=torch.int32)
    grid, target = (parts, len(flat)), int(mass * UNIT)
    search: Any = mass_kernel
    for turn in range(8):
        search[grid](flat, found, size, each, target, TURN=turn, N=together, num_warps=4)
    count: Any = equal_kernel
    count[grid](flat, found, equal, size, each, target, N=together, num_warps=4)
    mark: Any = mark_kernel
    mark[grid](
        *(flat, found, equal, kept, size, each, target),
        N=together,
        PARTS=triton.next_power_of_2(parts),
        num_warps=4,
    )
    return kept.view(weights.shape).view(torch.bool)
