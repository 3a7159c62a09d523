"""A cache layer in few bits: more for tokens that matter, fewer for the others.

Each channel is first divided by the square root of its largest magnitude, which takes the outlier
channels of keys out of the way; then every token is quantized uniformly between its own least and
greatest value. Codes are packed, several to a byte.
Shapes: B = sequences, G = key-value heads, K = tokens stored, T = tokens that came later, D = head
width, C = G * D channels, N = tokens of one precision, in all sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from gossamer.core import GossamerError
from gossamer.methods.attention.eviction.ragged import Ragged
from gossamer.methods.attention.eviction.shortened import Picked, become

__all__ = ["MixedBits", "MixedTensor", "dequantize", "mix", "quantize"]


def quantize(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Uniform codes of every row between its own least and greatest value.

    Parameters
    ----------
    rows : (N, C). bits : 1, 2, 4 or 8.

    Returns
    -------
    codes : uint8, (N, ceil(C * bits / 8)), earlier channels in lower bits. scale : (N, 2), step
    and least value, in the rows' dtype.
    """
    each = 8 // bits
    low, high = rows.aminmax(dim=1, keepdim=True)
    scale = torch.cat([(high - low) / (2**bits - 1), low], dim=1)
    step = scale[:, :1].float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((rows.float() - scale[:, 1:].float()) / step).round().clamp(0, 2**bits - 1)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -rows.shape[1] % each))
    codes = codes.unflatten(1, (-1, each))
    packed = torch.zeros_like(codes[..., 0])
    for place in range(each):
        packed |= codes[..., place] << (place * bits)
    return packed, scale


def dequantize(codes: Tensor, scale: Tensor, bits: int, channels: int) -> Tensor:
    """Undo :func:`quantize`: (N, C), each value within half a step of what it was."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    values = (codes[..., None] >> shifts) & (2**bits - 1)
    return values.flatten(1)[:, :channels].to(scale.dtype) * scale[:, :1] + scale[:, 1:]


@dataclass(frozen=True, eq=False)
class MixedTensor:
    """Keys or values of a layer, at two precisions.

    Parameters
    ----------
    high, low : packed codes of the tokens that matter and of the others, in order. high_scale,
    low_scale : step and least value of each. norm : (B, 1, C), what channels were divided by.
    bits : of the two.
    """

    high: Ragged
    low: Ragged
    high_scale: Ragged
    low_scale: Ragged
    norm: Tensor
    bits: tuple[int, int]

    @classmethod
    def encode(
        cls, tensor: Tensor, matters: Tensor, bits: tuple[int, int], real: Tensor | None = None
    ) -> "MixedTensor":
        """Quantize (B, G, K, D); ``matters`` is bool (B, K), ``real`` too, False at padding."""
        flat = tensor.transpose(1, 2).flatten(2)
        loud = flat.abs() if real is None else flat.abs() * real[..., None]
        norm = loud.amax(1, keepdim=True).float().sqrt()
        norm = torch.where(norm > 0, norm, 1.0).to(flat.dtype)
        parts = []
        for chosen, width in zip((matters, ~matters), bits, strict=True):
            codes, scale = quantize((flat / norm)[chosen], width)
            counts = chosen.sum(1, keepdim=True)
            parts += [Ragged(codes, counts), Ragged(scale, counts)]
        return cls(parts[0], parts[2], parts[1], parts[3], norm, bits)

    def decode(self, matters: Tensor, heads: int) -> Tensor:
        """(B, G, K, D) in the dtype that was encoded."""
        batch, channels = matters.shape[0], self.norm.shape[2]
        out = self.norm.new_empty(batch, matters.shape[1], channels)
        high, low = self.bits
        out[matters] = dequantize(self.high.flat, self.high_scale.flat, high, channels)
        out[~matters] = dequantize(self.low.flat, self.low_scale.flat, low, channels)
        return (out * self.norm).unflatten(2, (heads, -1)).transpose(1, 2)

    def _with(self, change: Callable[[Ragged], Ragged], norm: Tensor) -> "MixedTensor":
        return replace(
            self,
            high=change(self.high),
            low=change(self.low),
            high_scale=change(self.high_scale),
            low_scale=change(self.low_scale),
            norm=norm,
        )

    def rows(self, chosen: Tensor) -> "MixedTensor":
        """The sequences named by ``chosen`` (int64)."""
        return self._with(lambda part: part.rows(chosen), self.norm[chosen.to(self.norm.device)])

    def to(self, device: torch.device | str) -> "MixedTensor":
        """On another device."""
        return self._with(lambda part: part.to(device), self.norm.to(device))


def mix(layer: Any, matters: Tensor, bits: tuple[int, int], real: Tensor | None = None) -> None:
    """Put a cache layer's keys and values into few bits.

    A layer that is so already takes up the tokens that came later.

    Parameters
    ----------
    layer : a ``DynamicLayer``, or one this function changed before. matters : bool, (B, K), of the
        tokens not yet stored so. bits : of those that matter, and of the others. real : bool,
        (B, K), False at padding, which has no say in the channels' scale; None where there is none.
    """
    assert matters.shape[1] == layer.keys.shape[2]
    piece = _Piece(
        MixedTensor.encode(layer.keys, matters, bits, real),
        MixedTensor.encode(layer.values, matters, bits, real),
        matters,
    )
    if not isinstance(layer, MixedBits):
        become(layer, MixedBits)
        layer.pieces = []
    layer.pieces.append(piece)
    # Cloned, because an empty slice would hold the whole of the old tensors.
    layer.keys, layer.values = layer.keys[:, :, :0].clone(), layer.values[:, :, :0].clone()


@dataclass(frozen=True, eq=False)
class _Piece:
    """Tokens that were put into few bits at one time; channels are scaled per piece."""

    keys: MixedTensor
    values: MixedTensor
    matters: Tensor

    def rows(self, chosen: Tensor) -> "_Piece":
        own = chosen.to(self.matters.device)
        return _Piece(self.keys.rows(chosen), self.values.rows(chosen), self.matters[own])

    def to(self, device: torch.device | str) -> "_Piece":
        return _Piece(self.keys.to(device), self.values.to(device), self.matters.to(device))


class MixedBits(Picked):
    """A dynamic layer whose older tokens are stored in few bits.

    ``update`` returns all keys and values as ever, decoded, so no attention function notices; one
    layer at a time is there in full.

    Attributes
    ----------
    pieces : what is stored so, oldest first. keys, values : (B, G, T, D), later tokens as they are.
    """

    keys: Any
    values: Any
    pieces: list[_Piece]

    @property
    def stored(self) -> int:
        """Tokens in few bits."""
        return sum(piece.matters.shape[1] for piece in self.pieces)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return everything: (B, G, K + T, D)."""
        super().update(key_states, value_states, *args, **kwargs)
        heads = key_states.shape[1]
        keys = [piece.keys.decode(piece.matters, heads) for piece in self.pieces]
        values = [piece.values.decode(piece.matters, heads) for piece in self.pieces]
        return torch.cat([*keys, self.keys], dim=2), torch.cat([*values, self.values], dim=2)

    def get_seq_length(self) -> int:
        """All tokens, in whatever form."""
        return self.stored + self.keys.shape[-2] if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens.

        Raises
        ------
        GossamerError
            If they are in few bits already.
        """
        later = self.keys.shape[2] if self.is_initialized else 0
        if abs(tokens_to_remove) > later:
            raise GossamerError(
                f"cannot take back {abs(tokens_to_remove)} tokens: all but the latest {later} of "
                "this cache are packed in few bits; start with a new cache"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Hold nothing, as an ordinary layer."""
        super().reset()
        vars(self).pop("pieces", None)
        become(self, DynamicLayer)

    def _pick(self, rows: Tensor) -> None:
        self.pieces = [piece.rows(rows) for piece in self.pieces]
        super()._pick(rows)

    def offload(self) -> None:
        """Everything to the CPU."""
        super().offload()
        self.pieces = [piece.to("cpu") for piece in self.pieces]

    def prefetch(self) -> None:
        """Everything back to the device."""
        super().prefetch()
        self.pieces = [piece.to(self.device) for piece in self.pieces]
