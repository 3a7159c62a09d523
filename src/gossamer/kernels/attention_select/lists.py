"""From estimates to block lists: dispatch. ``triton`` (CUDA), ``reference`` (any device), ``auto``.

Shapes: B = batch, H = heads, G = key-value heads, K = keys, n = query blocks, m = key blocks,
D = head width. Flags of diagonals (B, G, m + 2): entry t + 1 stands for blocks of keys t before
the block that holds a block of queries' first key place.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.kernels.attention_select.list_reference import (
    block_lists_reference,
    cover_lines_reference,
    pooled_share_reference,
    top_lines_reference,
)
from gossamer.kernels.attention_select.op import LOG2E, Backend, runs, select_refusal

__all__ = ["Tiling", "block_lists", "cover_lines", "pooled_share", "top_lines"]

_LONGEST = 1 << 13
"""Blocks of keys that one program lists."""


@dataclass(frozen=True)
class Tiling:
    """How a call falls into blocks.

    Parameters
    ----------
    queries, keys : of the call. base : place of the first query, counted from the first key.
    high, wide : queries and keys of a block.
    """

    queries: int
    keys: int
    base: int
    high: int
    wide: int

    @property
    def rows(self) -> int:
        """n."""
        return -(-self.queries // self.high)

    @property
    def columns(self) -> int:
        """m."""
        return -(-self.keys // self.wide)


def pooled_share(
    query: Tensor,
    key: Tensor,
    *,
    base: int,
    scale: float | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention between block means, and of one more mean, averaged over heads that share keys.

    Parameters
    ----------
    query : (B, H, n + 1, D) float32, means of the n blocks of queries and of the last queries.
    key : (B, G, m, D) float32. base : blocks of keys before the first block of queries. Block i
        sees the key blocks up to base + i, the last queries what the last block sees.

    Returns
    -------
    share : (B, G, n, m), sums to 1 over the map. guess : (B, G, m), sums to 1: the last queries'.
    """
    if query.dtype != torch.float32 or key.dtype != torch.float32:
        raise GossamerError(f"means are {query.dtype} and {key.dtype}; give float32")
    if not runs(backend, select_refusal(query, key)):
        return pooled_share_reference(query, key, base, scale, softcap)
    import triton  # pyright: ignore[reportMissingImports]

    from gossamer.kernels.attention_select.list_kernels import share_kernel

    (batch, heads, rows, width), (_, shared, blocks, _) = query.shape, key.shape
    share = query.new_empty(batch, shared, rows - 1, blocks)
    guess = query.new_empty(batch, shared, blocks)
    repeat = triton.next_power_of_2(heads // shared)
    high = max(1, 64 // repeat)
    factor = (width**-0.5 if scale is None else scale) * LOG2E
    kernel: Any = share_kernel
    kernel[(triton.cdiv(rows, high), batch * shared)](
        *(query.contiguous(), key.contiguous(), share, guess, factor),
        *(1.0 if softcap is None else softcap * LOG2E, rows - 1, blocks, base, width),
        R=heads // shared,
        RP=repeat,
        ROWS=high,
        DC=min(32, max(16, triton.next_power_of_2(width))),
        N=32,
        SOFTCAP=softcap is not None,
        num_warps=4,
        num_stages=2,
    )
    return share, guess


def cover_lines(
    guess: Tensor,
    vertical: Tensor,
    slash: Tensor,
    *,
    block: int,
    gamma: float,
    tau: float,
    least: int,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns and diagonals of blocks that cover a mass, and which heads' guess is good.

    Parameters
    ----------
    guess : (B, G, m), attention by key block as block means have it. vertical, slash : (B, G, K),
        as ``last_mass`` gives them; there may be more than K / block key blocks.
    block : keys of a block. gamma : mass to cover. tau : a guess within this Jensen-Shannon
        distance is good; such heads keep ``least`` lines alone.
    least : fewest lines of either kind.

    Returns
    -------
    columns : bool, (B, G, m). diagonals : bool, (B, G, m + 2). Block 0 and diagonal 0 are kept.
    good : bool, (B, G).
    """
    if not runs(backend, select_refusal(guess, vertical, slash, wide=False)):
        return cover_lines_reference(guess, vertical, slash, block, gamma, tau, least)
    import triton  # pyright: ignore[reportMissingImports]

    from gossamer.kernels.attention_select.list_kernels import cover_kernel

    batch, shared, keys = slash.shape
    blocks, device = guess.shape[-1], guess.device
    wide = max(32, triton.next_power_of_2(blocks))
    mass = torch.empty(batch * shared, 2, 3, wide, device=device)
    columns = torch.empty(batch, shared, blocks, device=device, dtype=torch.bool)
    diagonals = torch.empty(batch, shared, blocks + 2, device=device, dtype=torch.bool)
    good = torch.empty(batch, shared, device=device, dtype=torch.bool)
    kernel: Any = cover_kernel
    kernel[(batch * shared, 2)](
        *(_rows(vertical), slash.contiguous(), guess.contiguous(), mass),
        *(x.view(torch.int8) for x in (columns, diagonals, good)),
        *(gamma, tau, _rows(vertical).stride(1), keys, blocks, least),
        SIDE=block,
        SP=triton.next_power_of_2(block),
        NB=max(1, min(wide, 4096 // triton.next_power_of_2(block))),
        MP=wide,
        NJ=max(1, 16384 // wide),
        num_warps=8,
    )
    return columns, diagonals, good


def _rows(x: Tensor) -> Tensor:
    """(B, G, K) whose rows lie evenly apart in memory."""
    return x if x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def top_lines(
    vertical: Tensor,
    slash: Tensor,
    wanted: Tensor,
    tiling: Tiling,
    *,
    width: int,
    sink: int,
    local: int,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The best keys and distances of every head, and the blocks of a window.

    Parameters
    ----------
    vertical, slash : (B, G, K), as ``last_mass`` gives them; K up to the last query's own key.
    wanted : int32, (G, 4): keys, distances, first blocks of keys, latest keys (none: far below 0).
    tiling : square blocks. width : most keys of a head. sink, local : the first keys and nearest
        distances rank before all others. Ties go to the lower place.

    Returns
    -------
    places : int64, (B, G, width), ascending, then -1. columns : bool, (B, G, m), the first blocks.
    diagonals : bool, (B, G, m + 2), those a chosen distance or one of the latest keys touches.
    """
    if not runs(backend, select_refusal(vertical, slash, wide=False)):
        return top_lines_reference(vertical, slash, wanted, tiling, width, sink, local)
    from gossamer.kernels.attention_select.list_kernels import top_kernel

    batch, shared, keys = slash.shape
    blocks, device = tiling.columns, slash.device
    places = torch.empty(batch, shared, width, device=device, dtype=torch.int64)
    columns = torch.empty(batch, shared, blocks, device=device, dtype=torch.bool)
    diagonals = torch.zeros(batch, shared, blocks + 2, device=device, dtype=torch.bool)
    kernel: Any = top_kernel
    kernel[(batch * shared, 2)](
        *(_rows(vertical), slash.contiguous(), wanted, places),
        *(columns.view(torch.int8), diagonals.view(torch.int8), _rows(vertical).stride(1)),
        *(shared, keys, blocks, width, sink, local, tiling.wide, tiling.base % tiling.wide),
        N=4096,
        num_warps=32,
    )
    return places, columns, diagonals


def block_lists(
    tiling: Tiling,
    *,
    kept: Tensor | None = None,
    use: Tensor | None = None,
    lines: tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Block lists in CSR. The host waits once, for their length.

    Parameters
    ----------
    kept : bool, (B, G, n, m), blocks to read. use : bool, (B, G), heads whose map counts.
    lines : columns (B, G, m) and diagonals (B, G, m + 2) to read besides; with them, blocks after
        the queries are left out.

    Returns
    -------
    indptr : int64, (B, G, n + 1), running over all rows. indices : int64, ascending in a row.
    """
    some = kept if kept is not None else lines[0] if lines is not None else None
    if some is None:
        raise GossamerError("there is neither a map nor lines; give blocks to list")
    reason = select_refusal(some, wide=False, types=(torch.bool,))
    if reason is None and tiling.columns > _LONGEST:
        reason = f"there are {tiling.columns} blocks of keys; the kernel takes up to {_LONGEST}"
    if not runs(backend, reason):
        return block_lists_reference(tiling, kept, use, lines)
    import triton  # pyright: ignore[reportMissingImports]

    from gossamer.kernels.attention_select.list_kernels import list_kernel

    (batch, shared), n, m = some.shape[:2], tiling.rows, tiling.columns
    counts = torch.empty(batch, shared, n + 1, device=some.device, dtype=torch.int32)
    given = [kept, use, *(lines or (None, None))]
    flags = [some if x is None else x.contiguous() for x in given]
    read = [x.view(torch.int8) for x in flags]
    shift = tiling.base // tiling.wide + 1
    sizes = (n, m, tiling.base, tiling.queries, tiling.high, tiling.wide, shift)
    options: dict[str, Any] = {
        "MP": triton.next_power_of_2(m),
        "HAS_MAP": kept is not None,
        "HAS_USE": use is not None,
        "HAS_LINES": lines is not None,
        "num_warps": 4,
    }
    kernel: Any = list_kernel
    grid = (n, batch * shared)
    kernel[grid](*read, counts, counts, *sizes, WRITE=False, **options)
    # The 0 before every row's counts makes the running sum the offsets of CSR.
    ends = counts.view(-1).cumsum(0)
    indices = torch.empty(int(ends[-1]), device=some.device, dtype=torch.int64)
    kernel[grid](*read, ends, indices, *sizes, WRITE=True, **options)
    return ends.view(batch, shared, n + 1), indices
