"""Positions: which tokens an intervention changes, the same with and without a KV cache.

A model's own forward sees a whole text or, with a cache, only its newest tokens. Places are those
in the whole text, so that both ways of running it change the same tokens.
Shapes: B = windows of a batch, T = tokens of a pass.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError

__all__ = ["Places", "parse_positions"]


_LISTENERS = "_gossamer_prompt_listeners"


def parse_positions(text: str) -> str | tuple[int, ...]:
    """``all``, ``last``, or places from the first real token, such as ``0,3,4``.

    Raises
    ------
    GossamerError
        For any other text.
    """
    if text in ("all", "last"):
        return text
    parts = text.split(",") if isinstance(text, str) else [""]
    if not all(part.strip().isdecimal() for part in parts):
        raise GossamerError(f"positions is {text!r}; give all, last, or places such as 0,3,4")
    return tuple(int(part) for part in parts)


class Places:
    """Finds the tokens of every pass of a model that an intervention may change.

    ``last`` is the last token of what the model is given and, inside ``generate``, every token
    after it: each is the last one when the next is chosen.

    Parameters
    ----------
    stack : undoes what is set on the model.
    """

    def __init__(self, model: nn.Module, positions: str, stack: ExitStack) -> None:
        self._where = parse_positions(positions)
        self.start: int | None = None
        self._tokens, self._past = 0, 0
        self._mask: Tensor | None = None
        if self._where == "all":
            return
        handle = model.register_forward_pre_hook(self._watch, with_kwargs=True)
        stack.callback(handle.remove)
        if self._where == "last" and hasattr(model, "generate"):
            self._listen(model, stack)

    def _listen(self, model: nn.Module, stack: ExitStack) -> None:
        """Learn of the prompt of every ``generate``; one wrapper serves all who listen."""
        if _LISTENERS not in vars(model):
            object.__setattr__(model, _LISTENERS, [])
            object.__setattr__(model, "generate", _announcing(model))
        listeners: list[Places] = vars(model)[_LISTENERS]
        listeners.append(self)

        def leave() -> None:
            listeners.remove(self)
            if not listeners:
                del vars(model)[_LISTENERS], vars(model)["generate"]

        stack.callback(leave)

    def _watch(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        first = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if first is None else first
        assert given is not None, "a model is called with ids or embeddings"
        cache = kwargs.get("past_key_values")
        self._tokens = given.shape[1]
        self._past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        fits = isinstance(mask, Tensor) and mask.shape == (len(given), self._past + self._tokens)
        self._mask = mask.bool() if fits else None

    def of(self, hidden: Tensor) -> Tensor | None:
        """Bool (B, T): the tokens to change; None for all of them.

        Raises
        ------
        GossamerError
            If the activations have no axis of tokens.
        """
        if self._where == "all":
            return None
        if hidden.dim() != 3 or hidden.shape[1] != self._tokens:
            raise GossamerError(
                f"activations {tuple(hidden.shape)} have no token of their own for each of the "
                f"{self._tokens} given; use positions 'all' here"
            )
        shape, device = hidden.shape[:2], hidden.device
        column = (self._past + torch.arange(shape[1], device=device)).expand(shape)
        mask = self._mask
        if self._where == "last":
            if self.start is not None:
                return column >= self.start
            if mask is None:
                return column == column[:, -1:]
            ends = mask.to(device) * torch.arange(1, mask.shape[1] + 1, device=device)
            return column == ends.amax(1, keepdim=True) - 1
        if mask is not None:
            column = (mask.to(device).long().cumsum(1) - 1)[:, -shape[1] :]
        return torch.isin(column, torch.tensor(self._where, device=device)) & self._real(shape)

    def _real(self, shape: torch.Size) -> Tensor | bool:
        return True if self._mask is None else self._mask[:, -shape[1] :]


def _announcing(model: Any) -> Callable[..., Any]:
    """The model's ``generate``, telling who listens where the prompt ends."""
    inner = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        prompt = kwargs.get("inputs_embeds") if first is None else first
        listeners: list[Places] = vars(model)[_LISTENERS]
        for places in listeners:
            places.start = 0 if prompt is None else prompt.shape[1] - 1
        try:
            return inner(*args, **kwargs)
        finally:
            for places in listeners:
                places.start = None

    return generate
