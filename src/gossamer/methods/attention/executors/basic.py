"""Executors every index runs on: the definition, a dense mask, and the model's own attention."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.methods.attention.executor import Call, Executor, attend, explicit_attend
from gossamer.methods.attention.index import FullIndex, KeyIndex
from gossamer.methods.attention.layout import MEMO

__all__ = ["Dense", "Masked", "Reference", "in_parts"]


_ROWS = 128
"""Queries run at once however many keys they have: shorter parts would leave a GPU idle."""


def in_parts(index: KeyIndex, call: Call, run: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """Run over slices of the queries whose scores and masks stay small.

    Fused attention is given the mask head by head and turns it into numbers of up to 4 bytes.
    """
    queries, keys = index.layout.queries, index.layout.keys
    rows = call.query.shape[0] * call.query.shape[1]
    step = max(_ROWS, MEMO // 4 // max(1, keys * rows))
    if step >= queries:
        return run(slice(0, queries), index.mask())
    parts = [slice(at, min(at + step, queries)) for at in range(0, queries, step)]
    return torch.cat([run(rows, index.mask(rows)) for rows in parts], dim=3)


class Reference(Executor):
    """The definition: softmax written out in fp32 (fp64 for fp64 inputs) over the kept pairs."""

    name = "reference"
    simulated = True

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        return None

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        return False

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        if not index.maskable:
            return index.attend(call)
        query = call.grouped_query()

        def part(rows: slice, mask: Tensor) -> Tensor:
            return explicit_attend(call, query[:, :, :, rows], call.key, call.value, mask)

        return in_parts(index, call, part).flatten(1, 2)


class Masked(Executor):
    """Fused attention under a dense mask, in parts where the mask is large: saves nothing."""

    name = "masked"
    simulated = True

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        return None if index.maskable else "the keys are chosen while it runs; no mask says which"

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        return True

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        query = call.grouped_query()

        def part(rows: slice, mask: Tensor) -> Tensor:
            return attend(call, query[:, :, :, rows], call.key, call.value, mask)

        return in_parts(index, call, part).flatten(1, 2)


class Dense(Executor):
    """The model's own full attention, for an index that removes nothing."""

    name = "dense"

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        return None if index.whole else "the index removes pairs"

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        return True

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        layout = index.layout
        aligned = layout.key_offset == 0 and (layout.queries == 1 or layout.query_offset == 0)
        if not (call.fusable and layout.causal and layout.padding is None and aligned):
            query = call.grouped_query()

            def part(rows: slice, mask: Tensor) -> Tensor:
                return attend(call, query[:, :, :, rows], call.key, call.value, mask)

            return in_parts(FullIndex(layout), call, part).flatten(1, 2)
        return functional.scaled_dot_product_attention(
            call.query,
            call.key[:, :, : layout.end],
            call.value[:, :, : layout.end],
            is_causal=layout.queries > 1,
            dropout_p=call.dropout,
            scale=call.scale,
            enable_gqa=call.groups[1] > 1,
        )
