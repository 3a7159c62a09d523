"""Which tokens of a forward pass come first in their text, wherever padding and cache put them.

Hooks inside the blocks see hidden states only. The model that owns the blocks also sees the
attention mask, the cache and the position ids, so one hook there notes them for the others.
Shapes: B = batch, T = tokens of this pass, W = width of the attention mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from math import floor
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError

__all__ = ["Positions", "logical_positions"]

_TOKENS = ("input_ids", "inputs_embeds")


def logical_positions(
    length: int,
    past: int = 0,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Position of every token among the real tokens of its row, from 0.

    Parameters
    ----------
    length : T, tokens of this pass.
    past : tokens already in the cache, padding included.
    mask : (B, W), nonzero where real; W is ``past + T``, or T when it covers this pass only.
    position_ids : (B or 1, T), believed when there is no mask of that form.

    Returns
    -------
    int64, (B or 1, T). Padding tokens get a number without meaning.
    """
    if mask is not None and mask.dim() == 2 and mask.shape[1] >= length:
        end = min(mask.shape[1], past + length)
        before = past if end == length else 0
        return before + ((mask[:, :end] != 0).cumsum(1) - 1)[:, end - length :]
    if position_ids is not None and position_ids.dim() == 2:
        return position_ids[:, -length:]
    return torch.arange(past, past + length, device=device)[None]


@dataclass(eq=False)
class Positions:
    """The tokens of the forward pass now running: which are real, which must stay dense.

    Parameters
    ----------
    dense_prefix : number of real tokens at the start of every row that are not masked.
    dense_share : share of the row's real tokens so far that stays dense as well, rounded down;
        what papers that mask only the last part of a text ask for.
    """

    dense_prefix: int
    dense_share: float = 0.0
    past: int = 0
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    shape: Sequence[int] | None = None
    _dense: Tensor | None = None
    _real: Tensor | None = None
    _ready: bool = False

    def begin(
        self,
        *,
        past: int = 0,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        """Note what the coming pass is told; ``shape`` is (B, T) where it is known."""
        self.past, self.mask, self.position_ids, self.shape = past, mask, position_ids, shape
        self._dense = self._real = None
        self._ready = False

    def watch(self, base: nn.Module) -> list[Any]:
        """Hook the model that owns the blocks; returns the handles to remove."""
        names = tuple(signature(base.forward).parameters)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            cache = given.get("past_key_values")
            tokens = next((v for k in _TOKENS if (v := given.get(k)) is not None), None)
            mask = given.get("attention_mask")
            self.begin(
                past=int(cache.get_seq_length()) if cache is not None else 0,
                mask=mask if isinstance(mask, Tensor) else None,
                position_ids=given.get("position_ids"),
                shape=None if tokens is None else (tokens.shape[0], tokens.shape[1]),
            )

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.begin()

        return [
            base.register_forward_pre_hook(enter, with_kwargs=True),
            base.register_forward_hook(leave, always_call=True),
        ]

    def dense(self, x: Tensor) -> Tensor | None:
        """Rows of x that must stay dense, as a bool that broadcasts over channels, or None.

        Parameters
        ----------
        x : (B, T, I), or (B * T, I) as routers and some models flatten it.
        """
        self._prepare(x)
        return _like(self._dense, x)

    def counted(self, x: Tensor) -> Tensor:
        """Rows of x that are real and masked: the tokens a sparsity is measured on."""
        self._prepare(x)
        rows = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)[..., None]
        for part, keep in ((self._dense, False), (self._real, True)):
            if (part := _like(part, x)) is not None:
                rows = rows & (part if keep else ~part)
        return rows[..., 0]

    def _prepare(self, x: Tensor) -> None:
        """Work the rows out once per pass, at the first gate that asks."""
        if self._ready:
            return
        self._ready = True
        if x.dim() == 3:
            self.shape = (x.shape[0], x.shape[1])
        assert self.shape is not None, "a flattened input needs a pass begun with its shape"
        batch, length = self.shape
        if self.mask is not None and self.mask.dim() == 2 and self.mask.shape[1] >= length:
            end = min(self.mask.shape[1], self.past + length)
            self._real = (self.mask[:, end - length : end] != 0).to(x.device)
        told = self.mask is not None or self.position_ids is not None
        prefix: int | Tensor = self.dense_prefix
        if self.dense_share:
            prefix = self._share(length).clamp_min(self.dense_prefix).to(x.device)[:, None]
        elif prefix == 0 or (not told and self.past >= prefix):
            return
        at = logical_positions(length, self.past, self.mask, self.position_ids, x.device)
        self._dense = (at.to(x.device) < prefix).expand(batch, length)

    def _share(self, length: int) -> Tensor:
        """(B or 1,) tokens that ``dense_share`` keeps dense in each row."""
        end = self.past + length
        total = torch.tensor([end])
        if self.mask is not None and self.mask.dim() == 2 and self.mask.shape[1] >= length:
            total = (self.mask[:, :end] != 0).sum(1)
        return torch.tensor([floor(self.dense_share * int(n)) for n in total])


def _like(rows: Tensor | None, x: Tensor) -> Tensor | None:
    """(B, T) rows in the layout of x, with a channel axis of 1."""
    if rows is None:
        return None
    if rows.numel() != x.shape[:-1].numel():
        raise GossamerError(
            f"a layer sees {x.shape[:-1].numel()} rows of a pass with {rows.numel()} tokens, so "
            "the first tokens cannot be told apart; leave that layer's role out"
        )
    return rows.reshape(*x.shape[:-1], 1)
