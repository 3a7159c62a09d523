"""Launching the block-sparse kernels: tiles, TMA descriptors, and the walk of every list.

Shapes: B = batch, H = heads, G = key-value heads, I = lists a batch row (G or H), Q = queries,
K = keys, C = columns, D, E = head widths of queries and values.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.tools.tensor_descriptor import (  # pyright: ignore[reportMissingImports]
    TensorDescriptor,
)

from gossamer.kernels.block_attention.triton_kernels import forward_kernel, plan_kernel

__all__ = [
    "LOG2E",
    "Lists",
    "Tiles",
    "describable",
    "descriptor",
    "forward",
    "has_tma",
    "hopper_fits",
    "tiles_for",
]

LOG2E = 1.4426950408889634


class Tiles(NamedTuple):
    """How a call is cut up.

    Parameters
    ----------
    heads : that share keys, stacked as rows of a tile. queries : of each. keys : of a tile.
    warps : of a program. stages : tiles of keys and values on their way.
    """

    heads: int
    queries: int
    keys: int
    warps: int
    stages: int


class Lists(NamedTuple):
    """What every query block reads, on the device.

    Parameters
    ----------
    indptr : (B or 1, I, rows + 1). indices : int32. block : (bq, bk).
    columns : int32, (B or 1, I, C), or None. first : int32, (B,), or None.
    """

    indptr: Tensor
    indices: Tensor
    block: tuple[int, int]
    columns: Tensor | None
    first: Tensor | None


def tiles_for(
    dtype: torch.dtype, width: int, block: tuple[int, int], share: int, hopper: bool
) -> Tiles:
    """The tiles that measured fastest on an H200 (``benchmarks/attention_prefill.py --tune``).

    Parameters
    ----------
    width : the larger of D and E. share : query heads that read one list.
    hopper : for the kernel with warps of one task each.
    """
    queries = 128 if block[0] % 128 == 0 else 64
    heads = 2 if queries == 64 and share % 2 == 0 else 1
    keys = 128 if block[1] % 128 == 0 and width <= 128 else 64
    if hopper:
        return Tiles(heads, queries, keys, 4, 2 if keys * width == 128 * 128 else 4)
    if dtype == torch.float32:
        return Tiles(1, 64, 32, 4 if width <= 64 else 8, 2)
    if width > 128:
        return Tiles(heads, queries, 64, 8, 2)
    return Tiles(heads, queries, 64, 4, 2)


def describable(x: Tensor) -> bool:
    """Whether TMA can read a (B, H, T, D) tensor where it lies."""
    strides = [s for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1]
    size = x.element_size()
    aligned = all(s > 0 and s * size % 16 == 0 for s in strides)
    return x.stride(3) == 1 and aligned and x.data_ptr() % 16 == 0 and x.numel() > 0


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def has_tma(device: torch.device) -> bool:
    """Whether tiles can be fetched by TMA."""
    return device.type == "cuda" and _capability(device) >= (9, 0)


@cache
def _gluon() -> bool:
    try:
        import gossamer.kernels.block_attention.gluon_kernels  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def hopper_fits(
    query: Tensor, key: Tensor, value: Tensor, block: tuple[int, int], lists: int
) -> bool:
    """Whether the kernel for Hopper takes a call: 16 bits, D = E of 64 or 128, even strides.

    Blocks of 64 queries need two heads that read one of the ``lists`` of a batch row.
    """
    width, share = query.shape[3], query.shape[1] // lists
    return (
        query.device.type == "cuda"
        and _capability(query.device) == (9, 0)
        and query.dtype in (torch.bfloat16, torch.float16)
        and width == value.shape[3]
        and width in (64, 128)
        and (block[0] % 128 == 0 or share % 2 == 0)
        and all(describable(x) for x in (query, key, value))
        and _gluon()
    )


@cache
def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Stands for an argument that is not used."""
    return torch.zeros(1, device=device, dtype=dtype)


def _gathered(x: Tensor, columns: Tensor, lists: int) -> Tensor:
    """(B, I, C, D): the rows of every list's columns; padding repeats row 0."""
    batch, shared = x.shape[:2]
    row = torch.arange(batch, device=x.device).view(-1, 1, 1)
    head = torch.arange(lists, device=x.device).view(1, -1, 1) // (lists // shared)
    return x[row, head, columns.clamp_min(0).long()]


def descriptor(x: Tensor, rows: int, wide: int) -> TensorDescriptor:
    """Strides along axes of one entry may be anything; TMA wants them even."""
    even = [s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape, strict=False)]
    return TensorDescriptor(x, list(x.shape), [*even, 1], [1, 1, rows, wide])


def _gluon_descriptor(x: Tensor, rows: int) -> Any:
    from triton.experimental.gluon import language as gl  # pyright: ignore[reportMissingImports]
    from triton.experimental.gluon.nvidia.hopper import (  # pyright: ignore[reportMissingImports]
        TensorDescriptor as Described,
    )

    even = [s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape, strict=False)]
    shape = [1, 1, rows, x.shape[3]]
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(shape, kind)
    return Described(x, list(x.shape), [*even, 1], shape, layout)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Lists,
    *,
    scale: float,
    query_offset: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    hopper: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """Attention of the listed keys: (B, H, Q, E), laid out as (B, Q, H, E).

    Parameters
    ----------
    hopper : run the kernel with warps of one task each; :func:`hopper_fits` says whether it can.
    """
    batch, heads, queries, width = query.shape
    shared, keys, wide = key.shape[1], key.shape[2], value.shape[3]
    columns, first, block = lists.columns, lists.first, lists.block
    count = lists.indptr.shape[1]
    share, rows, blocks = heads // count, lists.indptr.shape[2] - 1, -(-keys // block[1])
    tiles = tiles or tiles_for(query.dtype, max(width, wide), block, share, hopper)
    device = query.device
    none = _nothing(device, torch.int32)
    items = batch * count * rows
    bounds = torch.empty(items, 5, device=device, dtype=torch.int32)
    work = torch.empty(items, device=device, dtype=torch.int32)
    seen, single = none, none
    strides = (0, 0)
    if columns is not None:
        seen = torch.zeros(items, blocks, device=device, dtype=torch.int8)
        single = columns
        strides = (columns.stride(0) if len(columns) > 1 else 0, columns.stride(1))
    flags = {
        "CAUSAL": causal,
        "HAS_COLUMNS": columns is not None,
        "HAS_FIRST": first is not None,
        "HAS_WINDOW": window is not None,
    }
    total = 0 if columns is None else columns.shape[2]
    plan: Any = plan_kernel
    plan[(items,)](
        *(lists.indptr, lists.indices, single, none if first is None else first),
        *(seen, bounds, work),
        *(lists.indptr.stride(0) if len(lists.indptr) > 1 else 0, lists.indptr.stride(1)),
        *strides,
        *(rows, keys, query_offset, queries, window or 0, total, blocks, count, *block),
        N=tiles.keys,
        **flags,
        num_warps=1,
    )
    order = work.argsort().to(torch.int32)
    out = torch.empty(batch, queries, heads, wide, device=device, dtype=query.dtype)
    factor, cap = scale * LOG2E, 1.0 if softcap is None else softcap * LOG2E
    extra = _nothing(device, torch.float32) if sinks is None else sinks.float().contiguous()
    flags |= {"HAS_SINK": sinks is not None, "SOFTCAP": softcap is not None}
    ck, cv = key, value
    if columns is not None:
        ck, cv = _gathered(key, columns, count), _gathered(value, columns, count)
    number = items * (block[0] // tiles.queries) * (share // tiles.heads)
    to = (out.stride(0), out.stride(1), out.stride(2))
    geometry = (queries, keys, rows, query_offset, window or 0, total, blocks, count, share)
    if hopper:
        from gossamer.kernels.block_attention.gluon_kernels import special_kernel

        processors = torch.cuda.get_device_properties(device).multi_processor_count
        special: Any = special_kernel
        special[(min(number, processors),)](
            _gluon_descriptor(query, 64),
            *(_gluon_descriptor(x, tiles.keys) for x in (key, value, ck, cv)),
            *(out, lists.indices, order, bounds, single, seen),
            *(none if first is None else first, extra, factor, cap, *to, *strides, number),
            *(*geometry, heads // shared, block[0]),
            BK=block[1],
            D=width,
            N=tiles.keys,
            HEADS=tiles.heads,
            QT=tiles.queries,
            STAGES=tiles.stages,
            **flags,
            num_warps=4,
        )
        return out.transpose(1, 2)
    padded = [max(16, triton.next_power_of_2(n)) for n in (width, wide)]
    tma = has_tma(device) and all(describable(x) for x in (query, key, value, ck, cv))
    sources: list[Any] = [query, key, value, ck, cv]
    if tma:
        d, e = padded
        for n, (x, wider) in enumerate(zip(sources, (d, d, e, d, e), strict=True)):
            sources[n] = descriptor(x, tiles.queries if n == 0 else tiles.keys, wider)
        assert isinstance(sources[0], TensorDescriptor)
        sources[0].block_shape[1] = tiles.heads
    kernel: Any = forward_kernel
    kernel[(number,)](
        *sources,
        *(out, lists.indices, order, bounds, single, seen),
        *(none if first is None else first, extra, factor, cap),
        *(query.stride()[:3] + key.stride()[:3] + value.stride()[:3]),
        *(*to, *strides),
        *(heads, *geometry, heads // shared, block[0]),
        BK=block[1],
        D=width,
        E=wide,
        DP=padded[0],
        EP=padded[1],
        HEADS=tiles.heads,
        QT=tiles.queries,
        N=tiles.keys,
        TMA=tma,
        **flags,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out.transpose(1, 2)
