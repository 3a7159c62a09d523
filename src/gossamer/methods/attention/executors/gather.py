"""The gather executor: for each block of queries, collect the listed keys and attend to them.

Runs on any device and any model. It copies keys and values once per block of queries, so it pays
where the lists are short. All rows and heads of a query block are padded to the longest list.
"""

import torch
from torch import Tensor

from gossamer.methods.attention.executor import Call, Executor, attend
from gossamer.methods.attention.index import BlockIndex, KeyIndex

__all__ = ["Gather"]

_COPY = 2
"""Pairs a masked product computes in the time that one gathered pair takes, copy included."""


class Gather(Executor):
    """Collects the listed keys, then fused attention over them.

    Worth it when the gathered pairs, padded to the longest list of a query block and doubled for
    the copy, are fewer than the Q * K of a dense mask.
    """

    name = "gather"

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        if not isinstance(index, BlockIndex):
            return "the kept keys are no block lists"
        if not index.layout.regular:
            return "the model's mask is packed, looks ahead, or is fixed for compilation"
        return None

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        assert isinstance(index, BlockIndex)
        if index.block[0] == 1 and index.layout.queries > _FEW:
            return False
        width = index.indptr.diff(dim=-1).amax((0, 1)).sum() * index.block[1]
        extra = 0 if index.columns is None else index.columns.shape[2]
        gathered = int(width) * index.block[0] + extra * index.layout.queries
        return _COPY * gathered < index.layout.queries * (
            index.layout.end - index.layout.key_offset
        )

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        assert isinstance(index, BlockIndex)
        query, layout, high = call.grouped_query(), index.layout, index.block[0]
        outs = []
        for block in range(index.indptr.shape[2] - 1):
            rows = slice(block * high, min((block + 1) * high, layout.queries))
            place, listed = _places(index, block)
            if not place.shape[2]:
                shape = (*query.shape[:3], rows.stop - rows.start, call.value.shape[-1])
                outs.append(query.new_zeros(shape))
                continue
            key, value = _take(call.key, place), _take(call.value, place)
            at = layout.query_index[rows].view(1, 1, -1, 1)
            of = (place + layout.key_offset)[:, :, None, :]
            seen = _sees(index, at, of) & listed[:, :, None, :]
            # Without a mask fused attention is faster; asking a GPU would wait for it.
            free = seen.device.type == "cpu" and bool(seen.all())
            outs.append(attend(call, query[:, :, :, rows], key, value, None if free else seen))
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)).flatten(1, 2)


_FEW = 64
"""Queries up to which a list per query is collected query by query."""


def _places(index: BlockIndex, block: int) -> tuple[Tensor, Tensor]:
    """Key places (B, G, n) one block of queries reads, and which of them are listed."""
    wide, keys = index.block[1], index.layout.keys
    start, stop = index.indptr[:, :, block], index.indptr[:, :, block + 1]
    count = stop - start
    longest = int(count.max())
    step = torch.arange(longest, device=start.device)
    there = step < count[..., None]
    listed = (start[..., None] + step).clamp_max(max(0, len(index.indices) - 1))
    blocks = index.indices[listed] if len(index.indices) else listed
    inside = torch.arange(wide, device=start.device)
    place = (blocks[..., None] * wide + inside).flatten(2)
    kept = there[..., None].expand(*there.shape, wide).flatten(2) & (place < keys)
    if index.columns is not None:
        own = index.columns.clamp_min(0)
        covered = ((own[..., None] // wide == blocks[:, :, None, :]) & there[:, :, None, :]).any(-1)
        place = torch.cat([place, own], dim=2)
        kept = torch.cat([kept, (index.columns >= 0) & ~covered], dim=2)
    return place.clamp_max(keys - 1), kept


def _take(tensor: Tensor, place: Tensor) -> Tensor:
    """Keys or values (B, G, K, D) at places (B or 1, G or 1, n): (B, G, n, D)."""
    batch, shared, _, width = tensor.shape
    wanted = place[..., None].expand(batch, shared, place.shape[2], width)
    return tensor.gather(2, wanted)


def _sees(index: BlockIndex, at: Tensor, of: Tensor) -> Tensor:
    """The model's own mask for queries (1, 1, q, 1) and keys that differ by head (B, G, 1, n)."""
    layout = index.layout
    if layout.causal and not layout.elementwise:
        seen = of <= at
        if layout.padding is not None:
            row = torch.arange(len(layout.padding), device=of.device).view(-1, 1, 1, 1)
            seen = seen & layout.padding[row, of.expand(len(layout.padding), -1, -1, -1)]
        return seen
    heads = [layout.sees(at, of[:, h : h + 1]) for h in range(of.shape[1])]
    return torch.cat(heads, dim=1)
