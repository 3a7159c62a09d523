"""Launching the kernels of paged decoding.

Shapes: B = batch, H = heads, G = key-value heads, R = H / G, P = pages, K = keys,
D, E = head widths of queries and values.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor

from gossamer.kernels.page_attention.triton_kernels import (
    bounds_kernel,
    choose_kernel,
    decode_kernel,
    merge_kernel,
    score_kernel,
)

__all__ = ["MOST_PAGES", "Plan", "bounds", "choose", "decode", "plan_for", "scores"]

LOG2E = 1.4426950408889634
MOST_PAGES = 32768
"""Pages a row may have for one program to find its best."""


class Plan(NamedTuple):
    """How the pages of a row are cut up.

    Parameters
    ----------
    splits : programs a row. keys : read at once. warps : of a program. stages : loads on the way.
    """

    splits: int
    keys: int
    warps: int
    stages: int


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _early(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it ends (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(device: torch.device) -> dict[str, Any]:
    return {"launch_pdl": True} if _early(device) else {}


@cache
def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Stands for an argument that is not used."""
    return torch.zeros(1, device=device, dtype=dtype)


def plan_for(rows: int, pages: int, page: int, processors: int) -> Plan:
    """Two programs a processor, each of four tiles of 64 keys or more.

    Parameters
    ----------
    rows : batch times key-value heads. pages : read by a row, as far as it is known.
    """
    wanted = max(1, (2 * processors) // rows)
    most = max(1, pages * page // 128)
    return Plan(max(1, min(wanted, most, 64)), 64, 4, 3)


def bounds(key: Tensor, page: int, minmax: bool) -> tuple[Tensor, Tensor]:
    """Two vectors of every whole page, (B, G, P, D) in the keys' dtype; page a power of 2."""
    batch, shared, keys, width = key.shape
    pages = keys // page
    one, two = (key.new_empty(batch, shared, pages, width) for _ in range(2))
    if pages:
        together = max(1, 64 // page)
        kernel: Any = bounds_kernel
        kernel[(triton.cdiv(pages, together), batch * shared)](
            *(key, one, two, *key.stride()[:3], shared, pages, width),
            PAGE=page,
            N=together,
            DP=triton.next_power_of_2(width),
            MINMAX=minmax,
            num_warps=4,
        )
    return one, two


def scores(query: Tensor, first: Tensor, second: Tensor, minmax: bool) -> Tensor:
    """(B, G, P) float32: estimates of the largest q . k of every page, summed over heads."""
    batch, heads = query.shape[:2]
    shared, pages, width = first.shape[1:]
    out = torch.empty(batch, shared, pages, device=query.device, dtype=torch.float32)
    kernel: Any = score_kernel
    kernel[(triton.cdiv(pages, 64), batch * shared)](
        *(query, first, second, out, *query.stride()[:2]),
        *(*first.stride()[:3], *second.stride()[:3], shared, pages, width),
        R=heads // shared,
        N=64,
        DP=triton.next_power_of_2(width),
        MINMAX=minmax,
        EARLY=_early(query.device),
        num_warps=4,
        **_launch(query.device),
    )
    return out


def choose(score: Tensor, keep: int) -> Tensor:
    """(B * G * keep,) int32: the best pages of (B, G, P) scores, and page P, each row ascending."""
    pages = score.shape[2]
    padded = max(2, triton.next_power_of_2(pages))
    rows = score.shape[0] * score.shape[1]
    out = torch.empty(rows * keep, device=score.device, dtype=torch.int32)
    kernel: Any = choose_kernel
    kernel[(rows,)](
        *(score, out, pages, keep),
        PP=padded,
        EARLY=_early(score.device),
        num_warps=8,
        **_launch(score.device),
    )
    return out


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    page: int,
    *,
    end: int,
    scale: float,
    indices: Tensor,
    indptr: Tensor | None = None,
    keep: int = 0,
    first: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """One token over listed pages: (B, H, 1, E).

    Parameters
    ----------
    end : keys that exist. first : int32 (B,). indices : int32.
    indptr : (B or 1, G or 1, 2); None where every row has ``keep`` pages, one row after another.
    """
    batch, heads, _, width = query.shape
    shared, wide = key.shape[1], value.shape[3]
    rows, repeat, device = batch * shared, heads // shared, query.device
    if plan is None:
        known = len(indices) // rows if indptr is not None else keep
        plan = plan_for(rows, known, page, _processors(device))
    none, strides = _nothing(device, torch.int32), (0, 0)
    if indptr is not None:
        strides = tuple(indptr.stride(n) if indptr.shape[n] > 1 else 0 for n in (0, 1))
    part = torch.empty(rows * plan.splits * repeat, wide, device=device, dtype=torch.float32)
    stat = torch.empty(rows * plan.splits * repeat, 2, device=device, dtype=torch.float32)
    kernel: Any = decode_kernel
    kernel[(plan.splits, rows)](
        *(query, key, value, none if indptr is None else indptr, indices),
        *(none if first is None else first, part, stat, scale * LOG2E),
        *(1.0 if softcap is None else softcap * LOG2E, *query.stride()[:2]),
        *(*key.stride()[:3], *value.stride()[:3], *strides, shared, end, keep, width, wide),
        R=repeat,
        RP=max(16, triton.next_power_of_2(repeat)),
        DP=max(16, triton.next_power_of_2(width)),
        EP=max(16, triton.next_power_of_2(wide)),
        PAGE=page,
        N=plan.keys,
        CHOSEN=indptr is None,
        HAS_FIRST=first is not None,
        SOFTCAP=softcap is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        EARLY=_early(device),
        num_warps=plan.warps,
        num_stages=plan.stages,
        **_launch(device),
    )
    out = torch.empty(batch, heads, 1, wide, device=device, dtype=query.dtype)
    merge: Any = merge_kernel
    merge[(batch * heads,)](
        *(part, stat, _nothing(device, torch.float32) if sinks is None else sinks, out),
        *(plan.splits, wide),
        R=repeat,
        G=shared,
        SP=triton.next_power_of_2(plan.splits),
        EP=triton.next_power_of_2(wide),
        HAS_SINK=sinks is not None,
        EARLY=_early(device),
        num_warps=2,
        **_launch(device),
    )
    return out
