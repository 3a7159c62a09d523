"""Launching the kernels that skip tiles.

Shapes: B = batch, H = heads, G = key-value heads, Q = queries, K = keys, D, E = head widths of
queries and values.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor

from gossamer.kernels.block_attention.forward import LOG2E, describable, descriptor, has_tma
from gossamer.kernels.page_attention.triton_kernels import merge_kernel
from gossamer.kernels.skip_softmax.triton_kernels import skip_decode_kernel, skip_kernel

__all__ = ["decode", "prefill"]


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cut: float,
    factor: float,
    query_offset: int,
    first: Tensor | None,
    softcap: float | None,
    tile: tuple[int, int],
    warps: int = 8,
    stages: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``skip_softmax``; cut in base 2, factor in base 2."""
    (batch, heads, queries, width), (_, shared, keys, _) = query.shape, key.shape
    wide, (high, across) = value.shape[3], tile
    device = query.device
    out = torch.empty(batch, queries, heads, wide, device=device, dtype=query.dtype)
    tiles = triton.cdiv(queries, high)
    count = torch.empty(batch, heads, tiles, 2, device=device, dtype=torch.int32)
    padded = [max(16, triton.next_power_of_2(n)) for n in (width, wide)]
    sources: list[Any] = [query, key, value]
    tma = has_tma(device) and all(describable(x) for x in sources)
    if tma:
        sources = [
            descriptor(query, high, padded[0]),
            descriptor(key, across, padded[0]),
            descriptor(value, across, padded[1]),
        ]
    if stages is None:
        # As deep as shared memory allows: 3 tiles of 128 keys, 128 wide, are 192 KB.
        wide_tile = across * (padded[0] + padded[1]) * query.element_size()
        stages = 1 if query.dtype == torch.float32 else 3 if wide_tile <= 1 << 16 else 2
    kernel: Any = skip_kernel
    kernel[(tiles, batch * heads)](
        *sources,
        *(out, count, count if first is None else first, factor),
        *(1.0 if softcap is None else softcap * LOG2E, cut),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        *(out.stride(0), out.stride(1), out.stride(2)),
        *(heads, queries, keys, query_offset, heads // shared),
        D=width,
        E=wide,
        DP=padded[0],
        EP=padded[1],
        M=high,
        N=across,
        TMA=tma,
        HAS_FIRST=first is not None,
        SOFTCAP=softcap is not None,
        COUNT=True,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
    )
    return out.transpose(1, 2), count


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cut: float,
    factor: float,
    first: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    tile: int,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """As ``skip_softmax_decode``; cut in base 2, factor in base 2."""
    (batch, heads, _, width), (_, shared, keys, _) = query.shape, key.shape
    wide, repeat, rows = value.shape[3], heads // shared, batch * shared
    device = query.device
    if splits is None:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        most = max(1, triton.cdiv(keys, tile) // 4)
        splits = max(1, min(2 * processors // rows, most, 128))
    part = torch.empty(rows * splits * repeat, wide, device=device, dtype=torch.float32)
    stat = torch.empty(rows * splits * repeat, 2, device=device, dtype=torch.float32)
    count = torch.empty(batch, shared, splits, 2, device=device, dtype=torch.int32)
    kernel: Any = skip_decode_kernel
    kernel[(splits, rows)](
        *(query, key, value, count if first is None else first, part, stat, count, factor),
        *(1.0 if softcap is None else softcap * LOG2E, cut, *query.stride()[:2]),
        *(*key.stride()[:3], *value.stride()[:3], shared, keys, width, wide),
        R=repeat,
        RP=max(16, triton.next_power_of_2(repeat)),
        DP=max(16, triton.next_power_of_2(width)),
        EP=max(16, triton.next_power_of_2(wide)),
        N=tile,
        HAS_FIRST=first is not None,
        SOFTCAP=softcap is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=3,
    )
    out = torch.empty(batch, heads, 1, wide, device=device, dtype=query.dtype)
    merge: Any = merge_kernel
    merge[(batch * heads,)](
        *(part, stat, part if sinks is None else sinks.float().contiguous(), out, splits, wide),
        R=repeat,
        G=shared,
        SP=triton.next_power_of_2(splits),
        EP=triton.next_power_of_2(wide),
        HAS_SINK=sinks is not None,
        EARLY=False,
        num_warps=2,
    )
    return out, count
