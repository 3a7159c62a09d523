"""Lists of keys or pages for one token on a GPU: our paged decoding kernel."""

from typing import Any

from torch import Tensor

from gossamer.kernels.page_attention import page_attention, page_decode, page_refusal
from gossamer.methods.attention.decoding.best_pages import BestPages
from gossamer.methods.attention.executor import Call, Executor
from gossamer.methods.attention.executors.triton_prefill import (
    call_refusal,
    first_key,
    layout_refusal,
)
from gossamer.methods.attention.index import BlockIndex, KeyIndex

__all__ = ["TritonDecode"]


class TritonDecode(Executor):
    """The paged kernel: listed keys are read where they lie in the cache, nothing is copied.

    Of :class:`BestPages` it gets the scores and chooses by itself. Worth it when fewer keys are
    listed than there are.
    """

    name = "triton_decode"

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        if not isinstance(index, BlockIndex):
            return "the kept keys are no block lists"
        if index.layout.queries != 1:
            return f"there are {index.layout.queries} queries; the kernel takes one a row"
        if index.columns is not None:
            return "single columns lie beside the lists"
        held = index.score if isinstance(index, BestPages) else index.indices
        if held.device.type != "cuda":
            return f"the lists are on {held.device}; the kernel needs CUDA"
        reason = layout_refusal(index.layout)
        if reason is not None or call is None:
            return reason
        kernel = page_refusal(call.query, call.key, call.value, index.block[1])
        return call_refusal(call) or kernel

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        assert isinstance(index, BlockIndex)
        if isinstance(index, BestPages):
            return not index.whole
        lists = index.indptr.shape[0] * index.indptr.shape[1]
        keys = index.layout.end - index.layout.key_offset
        return len(index.indices) * index.block[1] < keys * lists

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        assert isinstance(index, BlockIndex)
        layout = index.layout
        options: dict[str, Any] = {
            "end": layout.end - layout.key_offset,
            "first": first_key(layout),
            "scale": call.scale,
            "softcap": call.softcap,
            "sinks": call.sink_logits,
        }
        read, page = (call.query, call.key, call.value), index.block[1]
        if isinstance(index, BestPages):
            return page_decode(*read, index.score, index.keep, page, **options)
        return page_attention(*read, index.indptr, index.indices, page, **options)
