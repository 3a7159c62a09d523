"""Random calls of the attention kernels, shared by their tests."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BlockCase", "block_case", "csr"]


def csr(kept: Tensor) -> tuple[Tensor, Tensor]:
    """indptr (B, I, rows + 1) and indices of a bool map (B, I, rows, blocks)."""
    counts = kept.sum(-1)
    ends = counts.flatten().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]]).view(counts.shape)
    indptr = torch.cat([starts, ends.view(counts.shape)[..., -1:]], dim=-1)
    return indptr, kept.nonzero()[:, -1].to(torch.int32)


class BlockCase(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    indptr: Tensor
    indices: Tensor
    block: tuple[int, int]
    options: dict


def block_case(
    batch: int,
    heads: tuple[int, int, int],
    lengths: tuple[int, int],
    widths: tuple[int, int],
    block: tuple[int, int],
    *,
    offset: int = 0,
    kept: float = 0.4,
    columns: int = 0,
    padded: bool = False,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options,
) -> BlockCase:
    """A call with random lists. heads: of queries, of keys, of lists. lengths: queries, keys."""
    g = torch.Generator().manual_seed(seed)
    (high, shared, lists), (queries, keys), (d, e) = heads, lengths, widths
    query = torch.randn(batch, queries, high, d, generator=g).transpose(1, 2)
    key = torch.randn(batch, shared, keys, d, generator=g)
    value = torch.randn(batch, keys, shared, e, generator=g).transpose(1, 2)
    rows, wide = -(-queries // block[0]), -(-keys // block[1])
    indptr, indices = csr(torch.rand(batch, lists, rows, wide, generator=g) < kept)
    options["query_offset"] = offset
    if columns:
        single = torch.full((batch, lists, columns + 3), -1, dtype=torch.int32)
        for one in single.view(-1, columns + 3):
            one[:columns] = torch.randperm(keys, generator=g)[:columns].sort().values
        options["columns"] = single
    if padded:
        options["first"] = torch.randint(0, keys // 3 + 1, (batch,), generator=g)
    if sinks:
        options["sinks"] = torch.randn(high, generator=g)
    tensors = [x.to(dtype) for x in (query, key, value)]
    moved = [x.to(device) for x in (*tensors, indptr, indices)]
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return BlockCase(*moved, block, options)
