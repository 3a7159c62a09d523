"""One sparsifier at a time on a model and on an optimizer: two would undo each other's masks."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gossamer.core import GossamerError

__all__ = ["Claim"]

_CLAIMED: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


class Claim:
    """What a sparsifier holds from ``attach`` to ``finish`` or ``remove``; a handle like a hook's.

    Raises
    ------
    GossamerError
        If another sparsifier holds the model or the optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, key: str) -> None:
        self.held = (model, optimizer)
        for one in self.held:
            if one in _CLAIMED:
                raise GossamerError(
                    f"{_CLAIMED[one]} is attached to this {type(one).__name__} already; call "
                    f"finish() or remove() of its sparsifier before attaching {key}"
                )
        for one in self.held:
            _CLAIMED[one] = key

    def remove(self) -> None:
        """Let others attach."""
        for one in self.held:
            _CLAIMED.pop(one, None)
