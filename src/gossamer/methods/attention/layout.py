"""Layout: where the queries and keys of one attention call stand in their sequences.

A model hands its attention function queries and keys without saying which key is padding, which
query comes first, or what its own sliding window is. Transformers tells all of that to the
function that builds masks; a layout keeps it unevaluated, so that a sparse executor asks only
about the pairs it reads and no (T, T) mask is ever made.
Shapes: B = batch (1 where all rows agree), Q = queries, K = keys, N = positions known so far.
Absolute index: place in the padded sequence. Logical position: place among a row's real tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["MEMO", "PHASES", "Layout", "Phase"]

MEMO = 1 << 26
"""Elements of a mask that may be held at once; larger ones are made in parts."""

VERIFIED = 16
"""New tokens up to which a call over a cache is decoding: assisted decoding verifies a few."""

Phase = Literal["prefill", "decode"]
PHASES: frozenset[Phase] = frozenset({"prefill", "decode"})

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal_rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The rule of a plain decoder: no key after its query."""
    return key <= query


@dataclass(frozen=True, eq=False)
class Layout:
    """The geometry of one attention call, shared by all layers that see the same mask.

    It travels through a model in place of the 4-D mask it stands for. It is no tensor: code that
    computes with masks fails on it instead of going wrong.

    Parameters
    ----------
    batch, queries, keys : sizes of the call.
    query_offset, key_offset : absolute index of the first query and of the first key; a cache
        that dropped its oldest keys has a key offset above 0.
    rule : the model's own mask as a function of absolute (batch, head, query, key) indices that
        broadcasts; it holds causality, the model's sliding window, packed sequences.
    padding : bool, (B, N), True for real tokens; None when all are.
    causal : the rule is causality and nothing else.
    regular : the rule looks back only and reads nothing but indices, so it may be asked about
        any subset of pairs, and sequences are not packed.
    elementwise : the rule must be asked pair by pair (it does not broadcast).
    """

    batch: int
    queries: int
    keys: int
    query_offset: int = 0
    key_offset: int = 0
    rule: Rule = causal_rule
    padding: Tensor | None = None
    causal: bool = True
    regular: bool = True
    elementwise: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What executors derived from this layout; every layer of the model asks for the same."""

    @property
    def known(self) -> int:
        """N: one more than the largest absolute index in the call."""
        return max(self.query_offset + self.queries, self.key_offset + self.keys)

    @property
    def end(self) -> int:
        """One more than the last query's absolute index: a static cache is empty from there on."""
        return self.query_offset + self.queries

    @property
    def phase(self) -> Phase:
        """``decode`` for one new token over a cache, or a few to verify, else ``prefill``."""
        return "decode" if self.query_offset > 0 and self.queries <= VERIFIED else "prefill"

    @cached_property
    def query_index(self) -> Tensor:
        """(Q,) absolute."""
        at = torch.arange(self.queries, device=self.device)
        return at + self.query_offset

    @cached_property
    def key_index(self) -> Tensor:
        """(K,) absolute."""
        return torch.arange(self.keys, device=self.device) + self.key_offset

    @cached_property
    def position(self) -> Tensor:
        """(B, N) logical position of every absolute index, -1 at padding."""
        if self.padding is not None:
            return torch.where(self.padding, self.padding.long().cumsum(1) - 1, -1)
        at = torch.arange(self.known, device=self.device)[None]
        if self.regular or self.query_offset or self.queries != self.keys or self.keys < 2:
            return at
        # Packed sequences: a token that does not see its predecessor starts a new one.
        later = at[:, 1:]
        joined = self.sees(later.view(1, 1, -1, 1), (later - 1).view(1, 1, -1, 1))
        joined = joined[:, 0, :, 0]
        first = torch.ones(len(joined), 1, dtype=torch.bool, device=self.device)
        start = torch.where(torch.cat([first, ~joined], dim=1), at, 0)
        return at - start.cummax(1).values

    @cached_property
    def first(self) -> Tensor:
        """(B,) absolute index of each row's first real token."""
        if self.padding is None:
            return torch.zeros(1, dtype=torch.long, device=self.device)
        return (self.position == 0).int().argmax(1)

    @cached_property
    def gapless(self) -> bool:
        """Every row's real tokens are consecutive: padding lies before or after, not between."""
        if self.padding is None:
            return True
        real = self.padding.int()
        return bool(((real.diff(dim=1) == 1).sum(1) + real[:, 0] <= 1).all())

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the model itself lets queries see keys.

        Parameters
        ----------
        query, key : absolute indices, broadcastable 4-D (B, 1, Q, K).

        Returns
        -------
        bool, broadcastable to (B, 1, Q, K).
        """
        batch = torch.arange(self.batch, device=self.device).view(-1, 1, 1, 1)
        head = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=self.device)
        if self.elementwise:
            shape = torch.broadcast_shapes(batch.shape, query.shape, key.shape)
            flat = [x.expand(shape).reshape(-1) for x in (batch, head, query, key)]
            seen = torch.vmap(self.rule)(*flat).view(shape)
        else:
            seen = self.rule(batch, head, query, key)
        if self.padding is not None:
            seen = seen & self.padding[batch, key]
        return seen

    def mask(self, rows: slice | None = None) -> Tensor:
        """The model's own mask, bool (B, 1, Q, K), or of some queries (B, 1, q, K).

        Costs q * K; the whole one is kept for the other layers while it is small.
        """
        if rows is not None:
            return self._mask(self.query_index[rows])
        if "mask" in self.memo:
            return self.memo["mask"]
        mask = self._mask(self.query_index)
        if mask.numel() <= MEMO:
            self.memo["mask"] = mask
        return mask

    def _mask(self, query: Tensor) -> Tensor:
        seen = self.sees(query.view(1, 1, -1, 1), self.key_index.view(1, 1, 1, -1))
        return seen.expand(len(seen), 1, len(query), self.keys)

    @property
    def plain(self) -> bool:
        """Causality is the whole rule: no padding, no window of the model, nothing packed."""
        return self.causal and self.regular and self.padding is None

    def to(self, device: torch.device | str, **_: object) -> "Layout":
        """The same geometry for tensors on another device."""
        padding = None if self.padding is None else self.padding.to(device)
        return replace(self, padding=padding, device=torch.device(device), memo={})

    # What models, ``generate`` and device hooks ask of a mask on its way to the attention.

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the mask this stands for."""
        return self.batch, 1, self.queries, self.keys

    @property
    def ndim(self) -> int:
        """4, as of any mask that is ready for the attention."""
        return 4

    def contiguous(self) -> "Layout":
        """Itself."""
        return self
