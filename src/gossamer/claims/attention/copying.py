"""Held-out text with a random string in it: prompts that hold something worth finding.

Shapes: R = rows, T = tokens of the prompt, S = tokens of the string.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.claims.lm import heldout, nano

__all__ = ["Task", "task"]


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts with a string that chance made.

    Parameters
    ----------
    prompt : int64, (R, T), text around a random string. string : int64, (R, S).
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
