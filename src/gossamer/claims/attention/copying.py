"""Recall by the packaged model: random tokens, much later their first few again; the rest follows.

What a trained decoder can do without being trained for it: copy a string it saw hundreds of tokens
ago. Which string is chance, so nothing but the keys of its first appearance helps.
Shapes: R = rows, T = tokens of the prompt, S = tokens of the string.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.claims.lm import heldout, nano

__all__ = ["CHUNK", "CUE", "Task", "accuracy", "prefilled", "prepared", "task"]

CUE = 4
"""Tokens of the second appearance that only prompt; the rest must be continued rightly."""
CHUNK = 16
"""Tokens decoded in one call: as many as count as decoding."""


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts and what must follow them.

    Parameters
    ----------
    prompt : int64, (R, T), text around a random string. string : int64, (R, S), asked for.
    place : where the string starts in the prompt.
    """

    prompt: Tensor
    string: Tensor
    place: int


def task(seed: int, rows: int = 2, length: int = 512, string: int = 52, place: int = 0) -> Task:
    """Held-out text with a random string put in at ``place`` (0 means anywhere in the middle)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    model: Any = nano().model
    ids = torch.randint(10, model.config.vocab_size, (rows, string), generator=generator)
    text = heldout(12, length).input_ids[(seed * rows) % 8 :][:rows]
    if not place:
        low, high = length // 8, length // 2 - string
        place = int(torch.randint(low, high, (1,), generator=generator))
    prompt = torch.cat([text[:, :place], ids, text[:, place : length - string]], dim=1)
    return Task(prompt, ids, place)


@torch.no_grad()
def prefilled(model: nn.Module, prompt: Tensor) -> Any:
    """The cache of a prompt, read with whatever is at work on the model."""
    body: Any = getattr(model, "base_model", model)
    return body(input_ids=prompt, use_cache=True).past_key_values


@cache
def prepared(seed: int, rows: int = 2, length: int = 512) -> tuple[Task, Any]:
    """A task and its cache under full attention. Copy the cache before use."""
    asked = task(seed, rows, length)
    return asked, prefilled(nano().model, asked.prompt)


@torch.no_grad()
def accuracy(
    model: nn.Module, kv: Any, string: Tensor, change: Callable[[Any], None] | None = None
) -> float:
    """Share of a string's tokens, behind its cue, that the model continues rightly.

    Parameters
    ----------
    kv : cache of the prompt; a copy is used. change : done to that copy first.
    """
    kv = copy.deepcopy(kv)
    if change is not None:
        change(kv)
    guesses = []
    for at in range(0, string.shape[1] - 1, CHUNK):
        part = string[:, at : min(at + CHUNK, string.shape[1] - 1)]
        called: Any = model
        guesses.append(called(input_ids=part, past_key_values=kv, use_cache=True).logits)
    right = torch.cat(guesses, dim=1).argmax(-1) == string[:, 1:]
    return float(right[:, CUE - 1 :].float().mean())
