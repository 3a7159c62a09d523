"""Block lists on a GPU: our block-sparse kernel, for prompts and their chunks."""

import torch
from torch import Tensor

from gossamer.kernels.block_attention import block_attention, block_refusal
from gossamer.methods.attention.diffusion.blocks import everything
from gossamer.methods.attention.executor import Call, Executor
from gossamer.methods.attention.index import BlockIndex, KeyIndex
from gossamer.methods.attention.layout import Layout

__all__ = ["TritonPrefill", "layout_refusal"]


def layout_refusal(layout: Layout, both_ways: bool = False) -> str | None:
    """Why a kernel that knows causality and padding before the text cannot run a layout.

    Parameters
    ----------
    both_ways : it also knows bidirectional attention.
    """
    if not ((layout.causal and layout.regular) or (both_ways and layout.rule is everything)):
        return "the model's mask is more than causality and padding before the text"
    if layout.padding is None:
        return None
    # Asked once per forward pass: the answer waits for the device.
    if "padded before" not in layout.memo:
        last = bool(layout.padding[:, -1].all())
        layout.memo["padded before"] = last and layout.gapless
    return None if layout.memo["padded before"] else "padding does not lie before the text"


def call_refusal(call: Call) -> str | None:
    """Why a kernel without a backward pass cannot run a call."""
    if call.dropout:
        return "the kernel knows no dropout"
    tensors = (call.query, call.key, call.value)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "the kernel has no backward pass"
    return None


def first_key(layout: Layout) -> Tensor | None:
    """(B or 1,) the first real key of each row, from the call's first key; None without padding."""
    if layout.padding is None:
        return None
    return (layout.first - layout.key_offset).clamp_min(0)


class TritonPrefill(Executor):
    """The block-sparse kernel; no result of the size of a mask is ever held.

    Worth it when the listed pairs, those on the diagonal counted whole, are fewer than the
    Q * K of a dense mask.
    """

    name = "triton_prefill"

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        if not isinstance(index, BlockIndex):
            return "the kept keys are no block lists"
        if index.layout.queries == 1:
            return "there is one query; backend 'triton_decode' is for those"
        if index.block[0] % 64 or index.block[1] % 64:
            high, wide = index.block
            return f"blocks are {high} x {wide}; the kernel takes multiples of 64"
        if index.indices.device.type != "cuda":
            return f"the lists are on {index.indices.device}; the kernel needs CUDA"
        reason = layout_refusal(index.layout, both_ways=True)
        if reason is not None or call is None:
            return reason
        return call_refusal(call) or block_refusal(call.query, call.key, call.value, index.block)

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        assert isinstance(index, BlockIndex)
        layout = index.layout
        lists = index.indptr.shape[0] * index.indptr.shape[1]
        listed = len(index.indices) * index.block[0] * index.block[1]
        extra = 0 if index.columns is None else index.columns.shape[2] * layout.queries
        dense = layout.queries * (layout.end - layout.key_offset)
        return listed + extra * lists < dense * lists

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        assert isinstance(index, BlockIndex)
        layout = index.layout
        return block_attention(
            *(call.query, call.key, call.value, index.indptr, index.indices, index.block),
            scale=call.scale,
            columns=index.columns,
            first=first_key(layout),
            query_offset=layout.query_offset - layout.key_offset,
            softcap=call.softcap,
            sinks=call.sink_logits,
            causal=layout.causal,
        )
