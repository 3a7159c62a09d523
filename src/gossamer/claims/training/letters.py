"""The language model small enough to train by the dozen in a claim: letters of the packaged text.

A perceptron that sees the last eight letters; its head stays dense, as in large language models.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.methods.training.base import SparseTraining, Sparsifier
from gossamer.models import read_documents

__all__ = ["BATCH", "HEAD", "letters", "loss_after", "perceptron"]

BATCH = 256
HEAD = "6"
_SEEN = 8
_LETTERS = 128
_WIDE = 12
_HELD = 60_000


@cache
def letters(split: Literal["calibration", "heldout"]) -> Tensor:
    """Letters of the packaged ``calibration`` or ``heldout`` text; others than ASCII are one."""
    text = "\n".join(read_documents(None, split)).encode()
    found = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return found.clamp(max=_LETTERS - 1)


def perceptron(width: int, seed: int) -> nn.Sequential:
    """Two hidden layers over the embeddings of eight letters; module :data:`HEAD` is the head."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Embedding(_LETTERS, _WIDE),
            nn.Flatten(),
            nn.Linear(_SEEN * _WIDE, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, _LETTERS),
        )


def loss_after(
    net: nn.Module,
    method: SparseTraining | None,
    steps: int,
    seed: int,
    *,
    lr: float = 5e-3,
    watch: Callable[[Sparsifier], None] | None = None,
) -> float:
    """Train by AdamW whose rate rises briefly and falls linearly to 0; held-out nats per letter.

    Parameters
    ----------
    method : None trains densely. watch : called with the sparsifier at the end.
    """
    text = letters("calibration")
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    sparsifier = None if method is None else method.attach(net, optimizer)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - _SEEN, (steps, BATCH), generator=generator)
    seen = torch.arange(_SEEN)
    for step, at in enumerate(starts):
        for group in optimizer.param_groups:
            rising, falling = (step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps)
            group["lr"] = lr * min(1.0, rising, falling)
        cross_entropy(net(text[at[:, None] + seen]), text[at + _SEEN]).backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()
        optimizer.zero_grad()
    if sparsifier is not None:
        if watch is not None:
            watch(sparsifier)
        sparsifier.remove()
    held = letters("heldout")
    with torch.no_grad():
        at = torch.arange(min(_HELD, len(held) - _SEEN))
        return float(cross_entropy(net(held[at[:, None] + seen]), held[at + _SEEN]))
