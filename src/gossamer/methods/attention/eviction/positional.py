"""Heads that read by position alone, over a cache that lets go of keys no later query reads.

What such a head will read is known before any key is seen, so giving up the rest changes no
answer. Heads differ, so each holds its own number of keys (``shortened.py``); a call is then told
which of them each query reads.
Shapes: B = batch (1 where all rows agree), G = key-value heads, q = queries, K = keys,
M = places of what is held.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.methods.attention.eviction.observe import windowed
from gossamer.methods.attention.eviction.packed import PackedIndex
from gossamer.methods.attention.eviction.shortened import Shortened, settle, shorten, why_not
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.layout import VERIFIED, Layout
from gossamer.methods.attention.memory import LayerState
from gossamer.methods.attention.selector import Selector
from gossamer.methods.attention.spans.index import logical_lengths

__all__ = ["EVERY", "TAIL", "HeldIndex", "PositionSelector"]

TAIL = 2 * VERIFIED
"""Latest tokens that are held in any case: assisted decoding takes some back and asks again."""

EVERY = 64
"""Tokens between two evictions: each copies what a layer holds."""

Rule = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class HeldIndex(PackedIndex):
    """What queries read, by position, of the keys that a shortened cache layer still holds.

    Parameters
    ----------
    position : int64, (B, G, M), logical position of what is held, -1 where a place holds nothing.
    rule : whether queries at logical positions (B, 1, q, 1) read keys at (B, G, 1, M).
    """

    position: Tensor
    rule: Rule

    @property
    def whole(self) -> bool:
        return False

    def mask(self, rows: slice | None = None) -> Tensor:
        query = self.model.query_index
        at = self.model.position[:, query if rows is None else query[rows]][:, None, :, None]
        of = self.position[:, :, None]
        return super().mask(rows) & self.rule(at, of) & (of >= 0)


class PositionSelector(Selector):
    """Chooses by position alone; with ``evict`` the cache keeps only what will be read.

    Keys go when decoding begins, so a prompt may be given in chunks, and then every so many tokens.
    """

    evict: bool

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return self.evict

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        return self.evict

    def frees(self, layer: int) -> bool:
        """Whether a layer gives up keys at all."""
        return True

    @abstractmethod
    def index(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        """The kept pairs of a call over all keys."""

    @abstractmethod
    def reads(self, layer: int, at: Tensor, of: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Whether queries read keys, causality aside.

        Parameters
        ----------
        at : logical positions of queries, (B, 1, q, 1). of : of keys, (B, G or 1, 1, K).
        lengths : real tokens of each row so far, or of all rows alike.

        Returns
        -------
        bool, broadcastable to (B, G, q, K).
        """

    @abstractmethod
    def needed(self, layer: int, of: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Keys that a query may read that comes after the text, or after taking back its end.

        Parameters
        ----------
        of : logical positions, (B, G or 1, K).

        Returns
        -------
        bool, broadcastable to (B, G, K).
        """

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        if layout.phase == "decode" and self.frees(layer):
            call.state.facts["chose"] = layout.end
        held = _layer_of(call, layer)
        if isinstance(held, Shortened):
            return self._held(held, layout, layer)
        return self.index(call, layout, layer)

    def _held(self, held: Shortened, layout: Layout, layer: int) -> HeldIndex:
        base = PackedIndex.over(layout, held.counts, held.keys.shape[2], held.size)
        lengths = logical_lengths(layout)

        def rule(at: Tensor, of: Tensor) -> Tensor:
            return self.reads(layer, at, of, lengths)

        position = _positions(held, layout, base.held)
        return HeldIndex(base.layout, base.model, base.held, position, rule)

    def owns(self, call: Call, layer: int) -> bool:
        return isinstance(_layer_of(call, layer), Shortened)

    def weighable(self, call: Call, layout: Layout, layer: int) -> bool:
        return not self.evict or (layout.phase == "prefill" and not self.owns(call, layer))

    def after(self, call: Call, layout: Layout, layer: int) -> None:
        held = _layer_of(call, layer)
        # Where another method decodes, or attention stays full, every key may be asked for.
        chose = layout.phase == "decode" and call.state.facts.get("chose") == layout.end
        if held is None or not (self.evict and chose) or windowed(held, layout):
            return
        lengths = logical_lengths(layout)
        if isinstance(held, Shortened):
            if held.keys.shape[2] >= TAIL + EVERY:
                real = PackedIndex.over(layout, held.counts, held.keys.shape[2], held.size).held
                position = _positions(held, layout, real)[:, :, :-TAIL]
                settle(held, self.needed(layer, position, lengths) & (position >= 0))
        elif why_not(held) is None and _due(call.state, layout):
            position = layout.position[:, None, : layout.end - TAIL]
            kept = self.needed(layer, position, lengths) & (position >= 0)
            if not bool(kept.all()):
                shorten(held, kept.expand(*held.keys.shape[:2], -1))

    def holds(self, length: int, layer: int) -> tuple[int, ...] | None:
        if not self.evict:
            return None
        if not self.frees(layer):
            return (length,)
        position = torch.arange(max(0, length - TAIL))[None, None]
        kept = self.needed(layer, position, (length,))
        return tuple(n + min(length, TAIL) for n in kept[0].sum(-1).tolist())


def _due(state: LayerState, layout: Layout) -> bool:
    """Whether to look what may go: not at every token."""
    if layout.end <= TAIL or layout.end - int(state.facts.get("looked", -EVERY)) < EVERY:
        return False
    state.facts["looked"] = layout.end
    return True


def _positions(held: Shortened, layout: Layout, real: Tensor) -> Tensor:
    """(B, G, M) logical position of everything held, -1 where a place holds nothing (not real)."""
    later = held.keys.shape[2]
    place = held.places.padded(extra=later)[..., 0].long()
    at = torch.arange(held.removed, held.removed + later, device=place.device)
    place[:, :, place.shape[2] - later :] = at
    found = layout.position.expand(len(place), -1)[:, None].expand(*place.shape[:2], -1)
    return torch.where(real, found.gather(2, place), -1)


def _layer_of(call: Call, layer: int) -> Any:
    layers = getattr(call.cache, "layers", ())
    return layers[layer] if layer < len(layers) else None
