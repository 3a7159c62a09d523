"""What a selector remembers of one layer of one key-value cache.

It lives on the cache, not on the selector: beam search reorders caches, assisted decoding crops
them, users copy them. The cache's layer is given a subclass of its own class that passes those
operations on; :meth:`forget` gives it its class back.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

__all__ = ["LayerState", "Memory", "watched"]


@dataclass(eq=False)
class LayerState:
    """Tensors and numbers about the keys of one layer.

    Parameters
    ----------
    tensors : batch first; their rows follow the cache's. seen : keys they cover; 0 means nothing
        is known yet, and the selector builds them from the call's keys, which are all there.
    keyed : tensors (B, K, ...) with one place per key, for what cannot be built from the call's
        keys; a crop cuts them as it cuts the cache.
    facts : plain numbers, the same for all rows.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keyed: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    seen: int = 0

    def clear(self) -> None:
        """Know nothing again."""
        self.crop(0)

    def crop(self, length: int) -> None:
        """Know nothing but the first ``length`` keys of what is stored per key."""
        self.tensors.clear()
        self.facts.clear()
        self.seen = 0
        self.keyed = {n: t[:, :length] for n, t in self.keyed.items()} if length else {}

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        for held in (self.tensors, self.keyed):
            for name, tensor in held.items():
                held[name] = tensor.index_select(0, rows.to(tensor.device))

    def repeat(self, times: int) -> None:
        """Every row ``times`` times in a row."""
        for held in (self.tensors, self.keyed):
            for name, tensor in held.items():
                held[name] = tensor.repeat_interleave(times, dim=0)


_FOLLOWS: dict[str, Callable[[LayerState, Any], None]] = {
    "reorder_cache": lambda state, rows: state.reorder(rows),
    "batch_repeat_interleave": lambda state, times: state.repeat(times),
    "batch_select_indices": lambda state, rows: state.reorder(_numbers(rows)),
    "crop": lambda state, length: state.crop(length),
    "reset": lambda state, _: state.clear(),
}
"""What a state does when its cache layer is told to."""


def _numbers(rows: Tensor) -> Tensor:
    return rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows


def _followed(kind: type, name: str) -> Callable[..., None]:
    own, follow = getattr(kind, name), _FOLLOWS[name]

    def method(self: Any, *args: Any, **options: Any) -> None:
        own(self, *args, **options)
        given = next(iter([*args, *options.values()]), None)
        # What a layer calls a crop's argument differs by version; its length afterwards does not.
        follow(self.gossamer_state, self.get_seq_length() if name == "crop" else given)

    return method


@cache
def watched(kind: type) -> type:
    """A subclass that looks like its base and passes on what happens to it.

    It has one base and adds no attributes: an object can only take on a class of its own layout.
    """
    names = [name for name in _FOLLOWS if hasattr(kind, name)]
    # A layer type that transformers registers by its subclasses must not be registered again.
    inside = {"_layer_type": None, "gossamer_base": kind}
    return type(kind.__name__, (kind,), {**inside, **{n: _followed(kind, n) for n in names}})


class Memory:
    """The states of all cache layers one applied selector has met."""

    def __init__(self) -> None:
        self._layers: WeakSet[Any] = WeakSet()

    def of(self, cache: Any, layer: int) -> LayerState:
        """The state of a cache's layer; of none, a new one for this call."""
        layers = getattr(cache, "layers", ())
        if layer >= len(layers):
            return LayerState()
        held = layers[layer]
        if "gossamer_state" not in vars(held):
            held.__class__ = watched(type(held))
            held.gossamer_state = LayerState()
        if held not in self._layers:
            # A copied cache brings its state along.
            self._layers.add(held)
        return held.gossamer_state

    def forget(self) -> None:
        """Give every layer its own class back."""
        for held in list(self._layers):
            if "gossamer_state" in vars(held):
                held.__class__ = type(held).gossamer_base
                del held.gossamer_state
        self._layers.clear()
