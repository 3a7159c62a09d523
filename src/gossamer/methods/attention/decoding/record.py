"""What a model's attention is called with, for methods that decide something beforehand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import run
from gossamer.methods.attention.index import FullIndex
from gossamer.methods.attention.install import Installation, layout_of
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import walk
from gossamer.models import Progress, Tokens, as_tokens, find_sites
from gossamer.models.capture import evaluating

__all__ = ["calibration_rows", "record"]

Visit = Callable[[Call, Layout, int], None]


def calibration_rows(method: str, data: Any, model: nn.Module, samples: int, length: int) -> Tokens:
    """The first sequences of the data, cut to a length.

    Raises
    ------
    GossamerError
        If there are no data.
    """
    if data is None:
        raise GossamerError(f"{method} looks at a model's attention on text first; give it data")
    tokens = as_tokens(data, model)
    return Tokens(tokens.input_ids[:samples, :length], tokens.attention_mask[:samples, :length])


@torch.no_grad()
def record(
    model: nn.Module, tokens: Tokens, visit: Visit, progress: Progress | None = None
) -> None:
    """Show every attention call of a model on some sequences; attention stays full.

    Parameters
    ----------
    tokens : run one sequence at a time, without a cache. visit : told call, layout and layer.
        Keys carry their positions. progress : told how many sequences are done.

    Raises
    ------
    GossamerError
        If the model is no causal decoder, or has a method of this family at work.
    """

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | Layout | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        layout = layout_of(attention_mask, query, key)
        sinks = options.get("s_aux", options.get("sinks"))
        softcap = options.get("softcap")
        call = Call(query, key, value, scale=scaling, softcap=softcap, sink_logits=sinks)
        number: Any = getattr(module, "layer_idx", 0)
        visit(call, layout, int(number))
        return run("dense", call, FullIndex(layout)).transpose(1, 2).contiguous(), None

    installed = Installation(model, "calibration", find_sites(model).attentions, forward)
    rows = len(tokens.input_ids)
    try:
        with evaluating(model):
            for row in range(rows):
                one = slice(row, row + 1)
                walk(model, Tokens(tokens.input_ids[one], tokens.attention_mask[one]))
                if progress is not None:
                    progress(row + 1, rows, "looking at attention")
    finally:
        installed.undo()
