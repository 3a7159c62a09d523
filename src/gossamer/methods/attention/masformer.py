"""MASFormer: full attention in a few layers, a sliding window in all others, trained so.

Far tokens need to be read somewhere, not everywhere: a few full layers carry what is far, the
windows of the others carry what is near, and attention costs what the few layers cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import EXECUTORS, choose
from gossamer.methods.attention.index import FullIndex, KeyIndex, WindowIndex, pairs_in_window
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.methods.attention.trained.applied import TrainedAttention
from gossamer.methods.attention.trained.hybrid import save_hybrid
from gossamer.methods.attention.trained.method import TrainedMethod
from gossamer.models import State, find_sites

__all__ = ["MASFormer", "MixedSpans", "SpanSelector", "placed"]

Placement = Literal["bottom", "middle", "top", "spread"]


def placed(layers: int, full: int, placement: Placement = "bottom") -> tuple[int, ...]:
    """Which layers, counted from 0, keep full attention.

    ``bottom`` takes the first, ``middle`` the central, ``top`` the last; ``spread`` takes the
    middle of each of ``full`` equal parts.

    >>> placed(8, 2, "bottom"), placed(8, 2, "top"), placed(8, 2, "spread")
    ((0, 1), (6, 7), (2, 6))
    """
    if placement == "spread":
        return tuple((2 * part + 1) * layers // (2 * full) for part in range(full))
    start = {"bottom": 0, "middle": (layers - full) // 2, "top": layers - full}[placement]
    return tuple(range(start, start + full))


@dataclass(frozen=True)
class SpanSelector(Selector):
    """Everything in the full layers, the latest keys in all others."""

    layers: int
    full: tuple[int, ...]
    window: int

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        return FullIndex(layout) if layer in self.full else WindowIndex(layout, 0, self.window)

    def pairs(self, length: int, layer: int, own: int | None) -> tuple[int, int]:
        return pairs_in_window(length, 0, length if layer in self.full else self.window, own)

    def simulated(self, backend: str, length: int) -> bool:
        index = WindowIndex(Layout(1, length, length), 0, self.window)
        return len(self.full) < self.layers and EXECUTORS[choose(index, backend)].simulated

    def state(self) -> State:
        return State({"layers": self.layers, "full": list(self.full)})

    def notes(self) -> tuple[str, ...]:
        named = ", ".join(map(str, self.full)) or "none"
        # Each windowed layer reaches window - 1 tokens further back.
        reach = (self.layers - len(self.full)) * (self.window - 1) + 1
        return (
            f"full layers: {named} of {self.layers}; the others read the latest {self.window} keys",
            f"windows stacked alone would reach {reach} tokens back",
        )


class MixedSpans(TrainedAttention):
    """A model with full and sliding layers at work."""

    selector: SpanSelector

    def save_hybrid(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Write the model as a hybrid one of transformers (``layer_types``, ``sliding_window``).

        Plain transformers loads it, and its sliding layers cache their window only.

        Raises
        ------
        GossamerError
            If the architecture has no hybrid form, or the folder holds something.
        """
        return save_hybrid(self.model, folder, self.selector.full, self.selector.window, tokenizer)

    def _notes(self) -> tuple[str, ...]:
        return (
            *super()._notes(),
            "save_hybrid() writes a model of plain transformers whose sliding layers cache their "
            "window only",
        )


@dataclass(frozen=True, kw_only=True)
class MASFormer(TrainedMethod):
    """Give most layers a sliding window, keep a few full, and train the model so.

    Parameters
    ----------
    full_layers : how many layers keep full attention; None takes a quarter of them, at least one.
    placement : where these are: ``bottom`` (first), ``middle``, ``top`` (last) or ``spread``.
    window : latest keys the other layers read, the query's own included, >= 1.
    steps, lr, batch_size, seed : of the training of all weights, the rate falling to 0 over the
        second half; 0 steps only puts the windows in place.
    dense_layers : further layers, the first ones, that keep full attention.

    Source: arXiv 2310.12442, §3.

    Departs from the paper: windows slide (the paper's local attention is block-wise); where the
    paper places its full layers could not be checked, so every placement is offered.
    """

    card: ClassVar = Card(
        title="Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at "
        "Every Layer",
        year=2023,
        arxiv="2310.12442",
        system="masformer",
        family="attention",
        when="during training",
        start="dense",
        site="attention scores of most layers",
        score="position: latest",
        pattern="window in most layers, full in a few",
        budget="full layers and a window",
        schedule="every call",
        update="training of all weights under the pattern",
        kernel="block-wise gather of the band, fused attention",
        departs="sliding windows for block-wise ones; the placement is a parameter",
    )
    works: ClassVar[type[TrainedAttention]] = MixedSpans
    example: ClassVar[Mapping[str, Any]] = {
        "full_layers": 1,
        "window": 4,
        "steps": 2,
        "batch_size": 3,
    }
    full: ClassVar[Mapping[str, Any]] = {"window": 1 << 30, "steps": 0}
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "the amount is a number of layers and a window",
        "encoders": "a window of the latest keys belongs to decoders",
    }

    full_layers: int | None = None
    placement: Placement = "bottom"
    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full_layers is not None:
            check_count("full_layers", self.full_layers, 0)
        check_count("window", self.window, 1)
        if self.placement not in get_args(Placement):
            raise GossamerError(
                f"placement is {self.placement!r}; choose from {', '.join(get_args(Placement))}"
            )

    def plan(self, model: nn.Module, data: Any, length: int) -> SpanSelector:
        layers = len(find_sites(model).attentions)
        full = max(1, layers // 4) if self.full_layers is None else self.full_layers
        if full > layers:
            raise GossamerError(
                f"full_layers is {full} for a model of {layers} layers; give at most {layers}"
            )
        return SpanSelector(layers, placed(layers, full, self.placement), self.window)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SpanSelector:
        return SpanSelector(int(meta["layers"]), tuple(meta["full"]), self.window)
