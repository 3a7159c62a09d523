"""One attention call, attention over some of its keys, and what every executor answers to.

Shapes: B = batch, H = heads, G = key-value heads, R = H / G, Q = queries, K = keys,
D, E = head widths of queries and values.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.core import GossamerError
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.memory import LayerState

__all__ = ["Call", "Executor", "attend", "explicit_attend"]


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
    state : what the selector remembers of this layer for this cache; new without a cache.
    step : shared by all layers within one forward pass of the model.
    cache : the transformers cache, or None.
    hidden : (B, Q, C), input of the attention module, or None where nobody asked for it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    dropout: float = 0.0
    state: LayerState = field(default_factory=LayerState, repr=False)
    step: dict[str, Any] = field(default_factory=dict, repr=False)
    cache: Any = field(default=None, repr=False)
    hidden: Tensor | None = field(default=None, repr=False)

    @property
    def groups(self) -> tuple[int, int]:
        """(G, R)."""
        heads, shared = self.query.shape[1], self.key.shape[1]
        if heads % shared:
            raise GossamerError(f"{heads} query heads do not divide into {shared} key-value heads")
        return shared, heads // shared

    def grouped_query(self) -> Tensor:
        """(B, G, R, Q, D): the queries by the keys they share."""
        shared, repeat = self.groups
        batch, _, queries, width = self.query.shape
        return self.query.view(batch, shared, repeat, queries, width)

    @property
    def exact(self) -> torch.dtype:
        """The dtype scores are summed in: fp32, or fp64 for fp64 inputs."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

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
    exact = call.exact
    score = torch.einsum("bgrqd,bgkd->bgrqk", query.to(exact), key.to(exact)) * call.factor
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


class Executor(ABC):
    """One way to run an index. All give the same numbers up to rounding.

    Attributes
    ----------
    name : of the backend. simulated : it computes every pair and masks; it saves nothing.
    """

    name: ClassVar[str]
    simulated: ClassVar[bool] = False

    @abstractmethod
    def refusal(self, call: Call | None, index: KeyIndex) -> str | None:
        """Why it cannot run an index, or None when it can.

        Parameters
        ----------
        call : None asks about the index alone, before there is a call.
        """

    @abstractmethod
    def worth(self, call: Call | None, index: KeyIndex) -> bool:
        """Whether it computes less than a dense mask would, by a stated rule."""

    @abstractmethod
    def run(self, call: Call, index: KeyIndex) -> Tensor:
        """(B, H, Q, E) in the query's dtype."""
