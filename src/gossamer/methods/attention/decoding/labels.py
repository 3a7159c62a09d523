"""Labels: a few channels of every key, kept apart, that stand for the whole of it.

Shapes: B = batch, G = key-value heads, R = query heads of one, Q = queries, K = keys,
T = tokens, D = head width, r = channels of a label.
"""

import torch
from torch import Tensor

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.memory import LayerState

__all__ = ["channel_loads", "decode_labels", "encode_labels", "label_weights", "remembered_labels"]

_SPARE = 4
"""A label cache that is full grows by a quarter, so that appending one key copies nothing."""


def channel_loads(query: Tensor, key: Tensor, real: Tensor | None = None) -> Tensor:
    """How much each key channel carries of a token's score with its own key.

    Parameters
    ----------
    query : (B, G, R, T, D). key : (B, G, T, D), after the rotary embedding: channels rotate into
        each other, so a rank taken before it says little. real : bool, (B, T); None for all.

    Returns
    -------
    (G, D) sums over tokens of |q_j k_j|, averaged over the heads that share keys; fp64.
    """
    load = (query.abs().mean(2) * key.abs()).double()
    if real is not None:
        load = load * real[:, None, :, None]
    return load.sum((0, 2))


def encode_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Four bits a channel, scaled per token.

    Parameters
    ----------
    labels : (..., r).

    Returns
    -------
    codes : uint8, (..., ceil(r / 2)), the even channel in the low bits. scale : (..., 2), step and
    least value in the labels' dtype.
    """
    low, high = labels.aminmax(dim=-1, keepdim=True)
    scale = torch.cat([(high - low) / 15, low], dim=-1)
    step = scale[..., :1].float().clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((labels.float() - scale[..., 1:].float()) / step).round().clamp(0, 15)
    codes = codes.to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scale


def decode_labels(codes: Tensor, scale: Tensor, channels: int) -> Tensor:
    """Undo :func:`encode_labels`: (..., r)."""
    both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :channels]
    return both.to(scale.dtype) * scale[..., :1] + scale[..., 1:]


def label_weights(query: Tensor, labels: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Attention weights as the labels tell them, the mean over the heads that share keys.

    Parameters
    ----------
    query : (B, G, R, Q, r), the labels' channels. labels : (B, G, K, r). scale : on the scores.
    seen : bool, (B or 1, 1, Q, K).

    Returns
    -------
    (B, G, Q, K), fp32 (fp64 for fp64 inputs).
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    score = torch.einsum("bgrqd,bgkd->bgrqk", query.to(exact), labels.to(exact)) * scale
    score = score.masked_fill(~seen[:, :, None], -torch.inf)
    return score.softmax(-1).nan_to_num(0.0).mean(2)


def remembered_labels(call: Call, layout: Layout, channels: Tensor, quantized: bool) -> Tensor:
    """(B, G, K, r) labels of all keys of a call; those of earlier keys come from its state.

    Parameters
    ----------
    channels : int64, (G, r). quantized : keep them at four bits a channel.
    """
    state = call.state
    if layout.key_offset or not layout.regular:
        state = LayerState()  # the first key moves from call to call
    end = min(layout.end - layout.key_offset, layout.keys)
    seen = min(state.seen, end)
    fresh = _take(call.key[:, :, seen:end], channels)
    if quantized:
        codes, scale = encode_labels(fresh)
        codes = _append(state, "codes", codes, seen)
        labels = decode_labels(codes, _append(state, "scale", scale, seen), channels.shape[1])
    else:
        labels = _append(state, "labels", fresh, seen)
    state.seen = end
    # A static cache has room for keys to come.
    return torch.nn.functional.pad(labels, (0, 0, 0, layout.keys - end))


def _take(key: Tensor, channels: Tensor) -> Tensor:
    batch, _, tokens, _ = key.shape
    return key.gather(3, channels[None, :, None].expand(batch, -1, tokens, -1))


def _append(state: LayerState, name: str, new: Tensor, seen: int) -> Tensor:
    """All rows (B, G, seen + new, ...) of a buffer in the state that grows by parts."""
    held, end = state.tensors.get(name), seen + new.shape[2]
    if held is None or held.shape[2] < end:
        room = new.new_empty(*new.shape[:2], end + end // _SPARE, *new.shape[3:])
        if held is not None:
            room[:, :, :seen] = held[:, :, :seen]
        held = state.tensors[name] = room
    held[:, :, seen:end] = new
    return held[:, :, :end]
