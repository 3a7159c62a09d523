"""Executors of the threshold index: by definition on any device, and fused on CUDA."""

from torch import Tensor

from gossamer.kernels.skip_softmax import skip_refusal, skip_softmax, skip_softmax_decode
from gossamer.methods.attention.executor import Call, Executor
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.tile_skip.threshold import ThresholdIndex

__all__ = ["FusedSkip", "Skip"]

_LEAST = 16
"""Queries and keys of the smallest tile the kernel takes."""


class Skip(Executor):
    """The definition: all scores, then softmax over the tiles that stay. Saves nothing."""

    name = "skip"
    simulated = True

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        if not isinstance(index, ThresholdIndex):
            return "no threshold decides which tiles are skipped"
        return None

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        return True

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        assert isinstance(index, ThresholdIndex)
        return index.attend(call)


class FusedSkip(Executor):
    """The kernel: softmax, reading of values and their product are left out for skipped tiles."""

    name = "triton_skip"

    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        if not isinstance(index, ThresholdIndex):
            return "no threshold decides which tiles are skipped"
        layout, call = index.layout, index.call
        if not (layout.causal and layout.regular and layout.gapless) or layout.key_offset:
            return "the model's mask is more than causality and padding before the text"
        if layout.padding is not None and not bool(layout.padding[:, -1].all()):
            return "rows are padded on the right"
        size = index.block[1]
        if size < _LEAST or size & (size - 1):
            return f"tiles of {size} are no power of 2 of at least {_LEAST}"
        if call.dropout or (call.sink_logits is not None and layout.queries > 1):
            return "the kernel knows neither dropout nor, in prompts, learned sinks"
        if index.threshold.numel() > 1 and bool((index.threshold != index.threshold[0]).any()):
            return "rows of different lengths have thresholds of their own"
        return skip_refusal(call.query, call.key, call.value)

    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        return True

    def run(self, call: Call, index: KeyIndex) -> Tensor:
        assert isinstance(index, ThresholdIndex)
        layout = index.layout
        threshold = float(index.threshold[0])
        first = None if layout.padding is None else layout.first
        if layout.queries == 1:
            return skip_softmax_decode(
                *(call.query, call.key, call.value, threshold),
                end=layout.end,
                scale=call.scale,
                first=first,
                softcap=call.softcap,
                sinks=call.sink_logits,
                tile=index.block[1],
            )[0]
        return skip_softmax(
            *(call.query, call.key, call.value, threshold),
            scale=call.scale,
            query_offset=layout.query_offset,
            first=first,
            softcap=call.softcap,
            tile=index.block,
        )[0]
