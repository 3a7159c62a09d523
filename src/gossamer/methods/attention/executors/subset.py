"""The subset executor: gather the chosen tokens, attend among them, scatter the result."""

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.methods.attention.executor import Call, Executor, attend
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.layout import MEMO, Layout
from gossamer.methods.attention.subset import SubsetIndex, places_of

__all__ = ["Subset"]

_PAIRS = MEMO >> 3
"""Pairs masked at once, over all heads."""

_ROWS = 128
"""Queries run at once however many keys they have: shorter parts would leave a GPU idle."""


class Subset(Executor):
    """Fused attention over gathered queries, keys and values; queries not chosen get zeros.

    Worth it in any case: it computes no pair of a token that was not chosen, but for filling up
    rows that chose fewer tokens than the longest.
    """

    name = "subset"

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        if not isinstance(index, SubsetIndex):
            return "the kept pairs are not those among some tokens"
        if not index.layout.regular:
            return "the model's mask is packed, looks ahead, or is fixed for compilation"
        return None

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        return True

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        assert isinstance(index, SubsetIndex)
        query = call.grouped_query()
        batch, shared, repeat, _, width = query.shape
        asked, read = places_of(index.queries), places_of(index.keys)
        key, value = _take(call.key, read), _take(call.value, read)
        wide = asked.clamp_min(0)[:, :, None, :, None].expand(batch, shared, repeat, -1, -1)
        few = query.gather(3, wide.expand(*wide.shape[:4], width))
        if _triangular(call, index, asked, read):
            part = functional.scaled_dot_product_attention(
                few.flatten(1, 2),
                key,
                value,
                is_causal=True,
                dropout_p=call.dropout,
                scale=call.scale,
                enable_gqa=repeat > 1,
            ).unflatten(1, (shared, repeat))
        else:
            part = self._masked(call, index.layout, few, key, value, asked, read)
        part = part * (asked >= 0)[:, :, None, :, None]
        size = value.shape[-1]
        out = part.new_zeros(batch, shared, repeat, index.layout.queries, size)
        # Fillers add zeros to place 0.
        return out.scatter_add(3, wide.expand(*wide.shape[:4], size), part).flatten(1, 2)

    def _masked(
        self,
        call: Call,
        layout: Layout,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        asked: Tensor,
        read: Tensor,
    ) -> Tensor:
        heads = call.query.shape[0] * call.query.shape[1]
        step = max(_ROWS, _PAIRS // max(1, read.shape[2] * heads))
        parts = []
        for at in range(0, max(1, asked.shape[2]), step):
            rows = slice(at, at + step)
            seen = _sees(layout, asked[:, :, rows].clamp_min(0), read)
            parts.append(attend(call, query[:, :, :, rows], key, value, seen))
        return torch.cat(parts, dim=3)


def _triangular(call: Call, index: SubsetIndex, asked: Tensor, read: Tensor) -> bool:
    """Whether plain causality among the gathered tokens is the whole mask."""
    return (
        call.fusable
        and index.layout.plain
        and index.layout.query_offset == index.layout.key_offset
        and asked.shape == read.shape
        and torch.equal(asked, read)
        and bool((asked >= 0).all())
    )


def _take(tensor: Tensor, place: Tensor) -> Tensor:
    """Keys or values (B, G, K, D) at places (B or 1, G or 1, n): (B, G, n, D)."""
    batch, shared, _, width = tensor.shape
    wanted = place.clamp_min(0)[..., None].expand(batch, shared, place.shape[2], width)
    return tensor.gather(2, wanted)


def _sees(layout: Layout, asked: Tensor, read: Tensor) -> Tensor:
    """(B, G, q, k) the model's own mask between chosen tokens; nobody sees a filler."""
    at = asked[..., None] + layout.query_offset
    of = read.clamp_min(0)[:, :, None] + layout.key_offset
    heads = [layout.sees(at[:, h : h + 1], of[:, h : h + 1]) for h in range(at.shape[1])]
    return torch.cat(heads, dim=1) & (read >= 0)[:, :, None]
