"""StreamingLLM: attend to the first few tokens and the latest ones, to nothing between.

Softmax must put its mass somewhere; trained decoders put the surplus on the first tokens
(attention sinks). A sliding window that drops them breaks; keeping four of them repairs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError
from gossamer.core.pattern import Window
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.eviction.positional import TAIL, PositionSelector
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import choose
from gossamer.methods.attention.index import WindowIndex, pairs_in_window
from gossamer.methods.attention.layout import Layout
from gossamer.models import State

__all__ = ["StreamingLLM"]

_EVERYTHING = 1 << 40
"""A window no text outgrows: sparsity 0 removes nothing at any length."""


@dataclass(frozen=True)
class WindowSelector(PositionSelector):
    """Sinks and the latest keys, the same in every layer."""

    sink: int
    recent: int
    evict: bool = False

    def index(self, call: Call, layout: Layout, layer: int) -> WindowIndex:
        return WindowIndex(layout, self.sink, self.recent)

    def reads(self, layer: int, at: Tensor, of: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return (at - of < self.recent) | (of < self.sink)

    def needed(self, layer: int, of: Tensor, lengths: tuple[int, ...]) -> Tensor:
        last = torch.tensor(lengths, device=of.device)[:, None, None] - TAIL
        return self.reads(layer, last, of, lengths)

    def pairs(self, length: int, layer: int, own: int | None) -> tuple[int, int]:
        return pairs_in_window(length, self.sink, self.recent, own)

    def simulated(self, backend: str, length: int) -> bool:
        index = WindowIndex(Layout(1, length, length), self.sink, self.recent)
        return choose(index, backend) in ("masked", "reference")

    def state(self) -> State:
        return State({"sink": self.sink, "recent": self.recent})

    def notes(self) -> tuple[str, ...]:
        kept = "all" if self.recent >= _EVERYTHING else f"the latest {self.recent}"
        return (f"every query reads {self.sink} sinks and {kept} keys",)


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(AttentionMethod):
    """Keep sinks and a sliding window of keys for every query, in prefill and in decode.

    Parameters
    ----------
    sparsity : fraction of the causally valid pairs removed at ``length`` tokens, or at the
        length of the data; the widest window that removes at least as much is taken. 0.5 when
        neither this nor ``recent`` is given.
    recent : latest keys kept, the query's own included, >= 1; give this or ``sparsity``.
    sink : first real tokens of each sequence always kept, >= 0. Padding is no token.
    backend : ``auto``, ``reference`` or ``window``.
    length : tokens at which a sparsity is solved, or None.
    evict : dynamic caches let go of the keys between, once decoding has begun (a rolling cache);
        answers stay the same. After ``restore()`` such a cache cannot be used any more and says so.

    Departs from the paper: the paper numbers positions anew inside its cache. Keys reach the
    attention interface with their positions already applied, so the original positions are
    kept. Inside the trained context that is the paper's masked form with the same keys; beyond
    it, nothing is claimed. Without ``evict`` the cache keeps all keys, so memory is not saved.
    """

    card: ClassVar = Card(
        title="Efficient Streaming Language Models with Attention Sinks",
        year=2023,
        arxiv="2309.17453",
        family="attention",
        when="inference",
        start="dense",
        site="attention scores",
        score="position: first or latest",
        pattern="window with sinks",
        budget="sparsity over causal pairs, or a number of keys",
        schedule="every call",
        kernel="block-wise gather of sinks and band, fused attention",
        departs="keys keep their original positions instead of positions inside the cache; "
        "the cache keeps all keys unless told to evict",
    )

    full: ClassVar = {"sparsity": 0.0}
    selects: ClassVar = False

    exempt: ClassVar = {
        "exact sparsity": "a window has whole keys: the widest that removes at least the sparsity",
        "encoders": "sinks and a causal window belong to decoders",
    }

    sparsity: float | None = None
    sink: int = 4
    recent: int | None = None
    evict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is None and self.recent is None:
            object.__setattr__(self, "sparsity", 0.5)
        if self.sparsity is not None and self.recent is not None:
            raise GossamerError(
                f"sparsity {self.sparsity} and recent {self.recent} both fix the window; give one"
            )
        for name, least in (("sink", 0), ("recent", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise GossamerError(f"{name} is {value!r}; give a whole number, at least {least}")

    def window(self, length: int) -> Window:
        """Sinks and recent keys at a length.

        Raises
        ------
        GossamerError
            If even a window of one key, beside the sinks, removes less than the sparsity.
        """
        if self.recent is not None:
            return Window(self.sink, self.recent)
        assert self.sparsity is not None
        if self.sparsity == 0.0:
            return Window(self.sink, _EVERYTHING)
        return Window.for_sparsity(self.sparsity, length, self.sink)

    def plan(self, model: nn.Module, data: Any, length: int) -> WindowSelector:
        window = self.window(length)
        return WindowSelector(window.sink, window.recent, self.evict)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> WindowSelector:
        return WindowSelector(int(meta["sink"]), int(meta["recent"]), self.evict)
