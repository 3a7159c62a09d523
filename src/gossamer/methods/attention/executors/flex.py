"""Block lists through torch's FlexAttention: for patterns that stay, and for training.

Compiling takes seconds to a minute for every new shape, so ``auto`` never takes it. On a GPU it is
compiled and reads listed blocks only; elsewhere torch runs it uncompiled, over all pairs.
"""

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gossamer.methods.attention.executor import Call, Executor
from gossamer.methods.attention.index import BlockIndex, KeyIndex

__all__ = ["Flex"]

_MASKS: WeakKeyDictionary[BlockIndex, BlockMask] = WeakKeyDictionary()
"""Masks of indices that are still in use: a pattern that stays is built once."""


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


class Flex(Executor):
    """FlexAttention over the listed blocks. The only one here with a backward pass that skips."""

    name = "flex"

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        if not isinstance(index, BlockIndex):
            return "the kept keys are no block lists"
        if index.columns is not None:
            return "single columns lie beside the blocks"
        if not (index.layout.causal and index.layout.regular):
            return "the model's mask is more than causality and padding"
        if call is None:
            return None
        if call.dropout or call.sink_logits is not None:
            return "FlexAttention knows neither dropout nor learned sinks"
        wanted = any(x.requires_grad for x in (call.query, call.key, call.value))
        if wanted and torch.is_grad_enabled() and not call.query.is_cuda:
            return "FlexAttention has no backward pass on a CPU"
        if index.indices.is_cuda and (index.block[0] % 128 or index.block[1] % 128):
            high, wide = index.block
            return f"blocks are {high} x {wide}; compiled, it takes multiples of 128"
        return None

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        return False

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        assert isinstance(index, BlockIndex)
        if index not in _MASKS:
            _MASKS[index] = _block_mask(index, call.groups)
        attend = _compiled() if call.query.is_cuda else flex_attention
        cap = call.softcap

        def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score if cap is None else cap * torch.tanh(score / cap)

        return attend(
            *(call.query, call.key, call.value),
            score_mod=None if cap is None else capped,
            block_mask=_MASKS[index],
            scale=call.scale,
            enable_gqa=call.groups[1] > 1,
        )


def _block_mask(index: BlockIndex, groups: tuple[int, int]) -> BlockMask:
    """The lists as torch takes them, and a rule that says the same pair by pair."""
    layout, (high, wide) = index.layout, index.block
    kept = index.blocks()
    heads = groups[0] * groups[1]
    kept = kept.repeat_interleave(heads // kept.shape[1], 1)
    # The rule below is asked for every row of the call, also where all rows agree.
    batch = max(len(kept), layout.batch)
    kept = kept.expand(batch, -1, -1, -1).contiguous()
    base = layout.query_offset - layout.key_offset
    padding = layout.padding
    if padding is not None:
        padding = padding[:, layout.key_offset : layout.key_offset + layout.keys]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        pair = kept[b, h, i // high, j // wide] & (j <= i + base)
        return pair if padding is None else pair & padding[b, j]

    # Blocks below the diagonal and without padding need no rule.
    row = torch.arange(kept.shape[2], device=kept.device)[:, None]
    column = torch.arange(kept.shape[3], device=kept.device)
    below = ((column + 1) * wide - 1 <= row * high + base) & ((column + 1) * wide <= layout.keys)
    whole = kept & below
    if padding is not None:
        real = torch.nn.functional.pad(padding, (0, -layout.keys % wide))
        whole = whole & real.view(batch, 1, 1, -1, wide).all(-1)

    def packed(part: Tensor) -> tuple[Tensor, Tensor]:
        order = part.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return part.sum(-1).to(torch.int32), order.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *packed(kept & ~whole),
        *packed(whole),
        BLOCK_SIZE=(high, wide),
        mask_mod=seen,
        seq_lengths=(layout.queries, layout.keys),
    )
