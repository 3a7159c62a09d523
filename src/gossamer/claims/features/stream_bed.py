"""What the claims on a language model's activations share: rows of nano, dictionaries on them."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from gossamer.claims.base import Figures
from gossamer.claims.features.beds import one_thread
from gossamer.claims.lm import heldout, nano
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.measure import score_rows
from gossamer.methods.features.source import ActivationSource
from gossamer.methods.features.splicing import loss_recovered

__all__ = ["batches", "middle", "spliced_figures"]


def middle() -> str:
    """The middle block of the packaged model."""
    return f"model.layers.{len(nano().model.model.layers) // 2}"


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless (size, columns) batches, in a new order every pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]


@cache
def _held_rows() -> Tensor:
    data = heldout()
    source = ActivationSource(nano().model, middle(), data, sink_multiple=None)
    return torch.cat(list(source.one_pass()))


def spliced_figures(name: str, made: Dictionary) -> Figures:
    """FVU, L0 and dead share on held-out text, and the loss when spliced in, by name."""
    with one_thread():
        score = score_rows(made, _held_rows().split(4096))
        loss = loss_recovered(nano().model, heldout(), made, middle())
    return {
        f"fvu_{name}": score.fvu,
        f"l0_{name}": score.l0,
        f"dead_{name}": score.dead,
        f"rise_{name}": loss.spliced - loss.clean,
        f"recovered_{name}": loss.recovered,
    }
