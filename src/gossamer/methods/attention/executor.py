"""Executors: attention over the kept keys only, by definition or by reading nothing else.

Every executor takes a call and an index and returns the same numbers up to rounding:

- ``reference`` is the definition: explicit softmax in fp32 (fp64 for fp64 inputs) over a dense
  mask. Slow, any index.
- ``masked`` is fused attention under a dense mask: runs everything, saves nothing.
- ``window`` reads sinks and a band for each block of queries: O(T * window) time and memory.
- ``dense`` is the model's full attention, where an index removes nothing.

Shapes: B = batch, H = heads, G = key-value heads, R = H / G, Q = queries, K = keys,
D, E = head widths of queries and values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.core import GossamerError, unknown
from gossamer.methods.attention.index import KeyIndex, WindowIndex
from gossamer.methods.attention.window import refusal, window_attention, window_cost

__all__ = ["Backend", "Call", "Ran", "attend", "choose", "execute", "run"]

Backend = Literal["auto", "reference", "window"]
Ran = Literal["dense", "masked", "reference", "window"]

_GATHER_KEYS = 256
"""Keys a decoded token could read in the time that gathering its window takes."""


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of a layer, as the model made it.

    Parameters
    ----------
    query : (B, H, Q, D). key : (B, G, K, D). value : (B, G, K, E). Keys carry their positions.
    scale : factor on the scores, or None for D ** -0.5.
    softcap : scores become ``softcap * tanh(score / softcap)``; None leaves them.
    sink_logits : (H,), a learned score that takes part in the softmax and has no value; or None.
    dropout : probability on the attention weights; 0 outside training.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    dropout: float = 0.0

    @property
    def groups(self) -> tuple[int, int]:
        """(G, R)."""
        heads, shared = self.query.shape[1], self.key.shape[1]
        if heads % shared:
            raise GossamerError(f"{heads} query heads do not divide into {shared} key-value heads")
        return shared, heads // shared

    @property
    def fusable(self) -> bool:
        """Whether torch's fused attention can compute it."""
        return self.softcap is None and self.sink_logits is None


def attend(call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of some queries over some keys of a call; rows that keep no key give zeros.

    Parameters
    ----------
    query : (B, G, R, q, D). key, value : (B, G, k, D or E).
    mask : bool, (B or 1, G or 1, q, k), or None for all.

    Returns
    -------
    (B, G, R, q, E).
    """
    if not call.fusable:
        return explicit_attend(call, query, key, value, mask)
    batch, shared, repeat, queries, width = query.shape
    # The heads that share keys are stacked as further queries: keys are read once, not repeated.
    stacked = query.reshape(batch, shared, repeat * queries, width)
    if mask is not None and repeat > 1:
        rows, heads, _, keys = mask.shape
        mask = mask[:, :, None].expand(rows, heads, repeat, queries, keys)
        mask = mask.reshape(rows, heads, repeat * queries, keys)
    out = functional.scaled_dot_product_attention(
        stacked, key, value, attn_mask=mask, dropout_p=call.dropout, scale=call.scale
    )
    return out.view(batch, shared, repeat, queries, value.shape[-1])


def explicit_attend(
    call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """:func:`attend` written out; softmax in fp32 or better."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    score = torch.einsum("bgrqd,bgkd->bgrqk", query.to(exact), key.to(exact)) * scale
    if call.softcap is not None:
        score = call.softcap * torch.tanh(score / call.softcap)
    if mask is not None:
        score = score.masked_fill(~mask[:, :, None], -torch.inf)
    if call.sink_logits is not None:
        shared, repeat = query.shape[1:3]
        extra = call.sink_logits.to(exact).view(1, shared, repeat, 1, 1)
        score = torch.cat([score, extra.expand(*score.shape[:-1], 1)], dim=-1)
    weight = torch.softmax(score, dim=-1).nan_to_num(0.0)[..., : key.shape[2]]
    weight = functional.dropout(weight, call.dropout, training=call.dropout > 0)
    return torch.einsum("bgrqk,bgke->bgrqe", weight, value.to(exact)).to(query.dtype)


def _split(call: Call) -> Tensor:
    shared, repeat = call.groups
    batch, _, queries, width = call.query.shape
    return call.query.view(batch, shared, repeat, queries, width)


def _reference(call: Call, index: KeyIndex) -> Tensor:
    return explicit_attend(call, _split(call), call.key, call.value, index.mask()).flatten(1, 2)


def _masked(call: Call, index: KeyIndex) -> Tensor:
    return attend(call, _split(call), call.key, call.value, index.mask()).flatten(1, 2)


def _dense(call: Call, index: KeyIndex) -> Tensor:
    layout = index.layout
    last = layout.query_offset + layout.queries
    aligned = layout.key_offset == 0 and (layout.queries == 1 or layout.query_offset == 0)
    if not (call.fusable and layout.causal and layout.padding is None and aligned):
        mask = layout.mask()
        return attend(call, _split(call), call.key, call.value, mask).flatten(1, 2)
    return functional.scaled_dot_product_attention(
        call.query,
        call.key[:, :, :last],
        call.value[:, :, :last],
        is_causal=layout.queries > 1,
        dropout_p=call.dropout,
        scale=call.scale,
        enable_gqa=call.groups[1] > 1,
    )


def _window(call: Call, index: KeyIndex) -> Tensor:
    assert isinstance(index, WindowIndex)
    query = _split(call)

    def part(rows: slice, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return attend(call, query[:, :, :, rows], key, value, mask)

    return window_attention(index, call.key, call.value, part).flatten(1, 2)


_EXECUTORS: dict[Ran, Callable[[Call, KeyIndex], Tensor]] = {
    "reference": _reference,
    "masked": _masked,
    "dense": _dense,
    "window": _window,
}


def choose(index: KeyIndex, backend: Backend = "auto") -> Ran:
    """The executor that will run an index.

    ``auto`` runs the model's own attention where nothing is removed. Else the pattern holds in
    any case, by whichever computes less: ``window`` when its pairs, masked ones included, are
    fewer than the Q * K of a dense mask, and for a single query when at least 256 keys go (the
    break-even measured on a CPU by ``benchmarks/window_attention.py``); otherwise ``masked``.

    Raises
    ------
    GossamerError
        If a named backend cannot run this index; the message says why.
    """
    if backend not in get_args(Backend):
        raise unknown("attention backend", backend, get_args(Backend))
    if backend == "reference":
        return "reference"
    reason = refusal(index)
    if backend == "window":
        if reason is not None:
            raise GossamerError(f"backend 'window' cannot run here: {reason}; use backend='auto'")
        return "window"
    if index.whole:
        return "dense"
    if reason is not None:
        return "masked"
    assert isinstance(index, WindowIndex)
    layout = index.layout
    spare = _GATHER_KEYS if layout.queries == 1 else 1
    dense = layout.queries * (layout.query_offset + layout.queries - layout.key_offset)
    return "window" if window_cost(index) + spare <= dense else "masked"


def run(name: Ran, call: Call, index: KeyIndex) -> Tensor:
    """Run one executor by name: (B, H, Q, E) in the query's dtype."""
    return _EXECUTORS[name](call, index)


def execute(call: Call, index: KeyIndex, backend: Backend = "auto") -> tuple[Tensor, Ran]:
    """Attention over the kept keys: (B, H, Q, E), and which executor ran."""
    name = choose(index, backend)
    return run(name, call, index), name
