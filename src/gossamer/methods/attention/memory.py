"""What a selector remembers of one layer of one key-value cache.

It lives on the cache, not on the selector: beam search reorders caches, assisted decoding crops
them, users copy them. The cache's layer is given a subclass of its own class that passes those
operations on; :meth:`forget` gives it its class back.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor

__all__ = ["LayerState", "Memory"]


@dataclass(eq=False)
class LayerState:
    """Tensors and numbers about the keys of one layer.

    Parameters
    ----------
    tensors : batch first; their rows follow the cache's. seen : keys they cover; 0 means nothing
        is known yet, and the selector builds them from the call's keys, which are all there.
    facts : plain numbers, the same for all rows.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    seen: int = 0

    def clear(self) -> None:
        """Know nothing again."""
        self.tensors.clear()
        self.facts.clear()
        self.seen = 0

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.index_select(0, rows.to(tensor.device))

    def repeat(self, times: int) -> None:
        """Every row ``times`` times in a row."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.repeat_interleave(times, dim=0)


class _Watched:
    """Passes what happens to a cache layer on to its state."""

    gossamer_state: LayerState

    def reorder_cache(self, beam_idx: Tensor) -> None:
        cast(Any, super()).reorder_cache(beam_idx)
        self.gossamer_state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        cast(Any, super()).batch_repeat_interleave(repeats)
        self.gossamer_state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        cast(Any, super()).batch_select_indices(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.gossamer_state.reorder(indices)

    def crop(self, tokens_to_remove: int) -> None:
        cast(Any, super()).crop(tokens_to_remove)
        self.gossamer_state.clear()

    def reset(self) -> None:
        cast(Any, super()).reset()
        self.gossamer_state.clear()


@cache
def _watched(kind: type) -> type:
    # A layer type that transformers registers by its subclasses must not be registered again.
    return type(kind.__name__, (_Watched, kind), {"_layer_type": None})


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
        if not isinstance(held, _Watched):
            held.__class__ = _watched(type(held))
            cast(Any, held).gossamer_state = LayerState()
        if held not in self._layers:
            # A copied cache brings its state along.
            self._layers.add(held)
        return cast(Any, held).gossamer_state

    def forget(self) -> None:
        """Give every layer its own class back."""
        for held in list(self._layers):
            if isinstance(held, _Watched):
                held.__class__ = type(held).__mro__[2]
                del held.gossamer_state
        self._layers.clear()
