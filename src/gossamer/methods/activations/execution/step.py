"""One token through a whole model in one native call, with the cache that ``generate`` holds.

The stand-in takes the place of the forward of the module that owns the blocks, for decode steps
only; everything else goes to the model's own. Shapes: B = sequences, T = tokens in the cache,
N = key heads, D = head size, L = blocks.
"""

import ctypes
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gossamer.kernels.gather_gemv import native
from gossamer.methods.activations.execution.program import Program
from gossamer.methods.activations.positions import Positions
from gossamer.models import at_work

__all__ = ["Buffers", "Step"]

_KNOWN = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids"),
    *("past_key_values", "use_cache", "cache_position"),
}


class Buffers:
    """Room for keys and values beyond what a cache holds, so that a step appends in place.

    A cache of transformers grows by making every tensor anew. Here its tensors become views of
    larger ones; a tensor that somebody replaced in between is noticed and copied again.
    """

    def __init__(self) -> None:
        self.room: Tensor | None = None  # (2L, B, N, room, D)
        self.views: tuple[Tensor, ...] = ()
        self.caches: Any = None

    def ready(self, layers: list[Any]) -> int:
        """Make place for one more token; returns T."""
        count, past = len(layers), layers[0].keys.shape[-2]
        views = self.views
        same = len(views) == 2 * count and all(
            layer.keys is views[2 * i] and layer.values is views[2 * i + 1]
            for i, layer in enumerate(layers)
        )
        room = self.room
        if not same or room is None or past >= room.shape[-2]:
            held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
            batch, heads, _, size = held[0].shape
            room = held[0].new_empty(2 * count, batch, heads, past + max(64, past // 2), size)
            for to, tensor in zip(room, held, strict=True):
                to[..., :past, :] = tensor
            width, stride, start = room.element_size(), room.stride(), room.data_ptr()
            self.room = room
            self.caches = (native.Cache * count)(
                *(
                    native.Cache(
                        start + 2 * i * stride[0] * width,
                        start + (2 * i + 1) * stride[0] * width,
                        stride[1],
                        stride[2],
                    )
                    for i in range(count)
                )
            )
        return past

    def grow(self, layers: list[Any], length: int) -> None:
        """Let the cache see the token that was appended."""
        assert self.room is not None
        self.views = self.room[..., :length, :].unbind()
        for i, layer in enumerate(layers):
            layer.keys, layer.values = self.views[2 * i], self.views[2 * i + 1]


class Step:
    """The stand-in for the forward of the module that owns the blocks.

    Parameters
    ----------
    most : rows a step may have.
    output : class of the model's output.
    """

    def __init__(
        self,
        base: nn.Module,
        program: Program,
        positions: Positions,
        counting: Any,
        most: int,
    ) -> None:
        self.base, self.program, self.positions = base, program, positions
        self.counting, self.most = counting, most
        self.own = base.forward
        self.output: type | None = None
        self.level = native.library()[1]
        self.run = native.library()[0].gossamer_gather_step
        self.pool = native.pool()
        self.dtype = program.parts.embed.weight.dtype
        self.buffers: WeakKeyDictionary[Any, Buffers] = WeakKeyDictionary()
        self.steps = 0
        self.model: Any = None
        self.works: tuple[Any, ...] = ()

    def know(self, model: Any) -> None:
        """Remember which methods are at work on the model while this step holds."""
        self.model, self.works = model, at_work(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A decode step natively; anything else as the model does it."""
        if not args and self.output is not None and self._fits(kwargs):
            return self._step(kwargs)
        found = self.own(*args, **kwargs)
        if self.output is None and hasattr(found, "past_key_values"):
            self.output = type(found)
        return found

    def _fits(self, given: dict[str, Any]) -> bool:
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        cache = given.get("past_key_values")
        layers = getattr(cache, "layers", None)
        if tokens is None or not layers or given.get("use_cache") is False:
            return False
        if tokens.shape[1] != 1 or not 1 <= len(tokens) <= self.most:
            return False
        if torch.is_grad_enabled() or self.base.training or self.counting():
            return False
        # A method that joined since has hooks in the blocks, which this step would pass by.
        if self.model is not None and at_work(self.model) != self.works:
            return False
        # Outputs of inner layers are the model's own affair.
        if any(given[name] for name in given if name not in _KNOWN):
            return False
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return False
        first = layers[0]
        if len(layers) != self.program.model.blocks or not getattr(first, "is_initialized", False):
            return False
        length = first.keys.shape[-2]
        if mask is not None and mask.shape[1] != length + 1:
            return False
        return length > 0 and all(
            type(layer).__name__ == "DynamicLayer"
            and layer.is_initialized
            and layer.keys.shape == first.keys.shape
            and layer.keys.dtype == self.dtype
            and layer.keys.shape[0] == len(tokens)
            for layer in layers
        )

    def _step(self, given: dict[str, Any]) -> Any:
        tokens, embeds = given.get("input_ids"), given.get("inputs_embeds")
        cache, mask = given["past_key_values"], given.get("attention_mask")
        hidden = self.program.parts.embed(tokens) if embeds is None else embeds
        layers: list[Any] = cache.layers
        buffers = self.buffers.get(cache)
        if buffers is None:
            buffers = self.buffers.setdefault(cache, Buffers())
        past = buffers.ready(layers)
        batch = len(hidden)
        at = given.get("position_ids")
        at = torch.tensor([[past]]) if at is None else at
        cos, sin = self.program.parts.rotary(hidden, at)
        if len(cos) != batch:
            cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        if cos.shape[-1] != self.program.model.rotary:
            self.program.model.rotary = cos.shape[-1]
        seen = None
        if mask is not None and not bool(mask.all()):
            seen = (mask != 0).to(torch.uint8).contiguous()
        dense = self.positions.dense(hidden)
        flags = None
        if dense is not None and bool(dense.any()):
            flags = dense.reshape(batch).to(torch.uint8).contiguous()
        x = hidden.to(torch.float32, copy=True).contiguous()
        out = torch.empty_like(x)
        self.run(
            *(ctypes.byref(self.program.model), x.data_ptr(), cos.data_ptr(), sin.data_ptr()),
            *(buffers.caches, past, None if seen is None else seen.data_ptr()),
            *(None if flags is None else flags.data_ptr(), batch, out.data_ptr()),
            *(torch.get_num_threads(), self.level, self.pool),
        )
        buffers.grow(layers, past + 1)
        self.steps += 1
        assert self.output is not None
        return self.output(last_hidden_state=out.to(self.dtype), past_key_values=cache)
