"""What the claims of prompt methods share: density and kept mass, planted and on a model."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.claims.attention.planted import Planted
from gossamer.claims.lm import heldout, here, nano
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import Kept, kept_mass
from gossamer.methods.attention.random_keys import RandomKeys
from gossamer.methods.attention.selector import Selector
from gossamer.methods.attention.streaming_llm import StreamingLLM
from gossamer.models import Tokens

__all__ = ["Heads", "controls", "fixed", "measured", "of_index", "on_planted", "window_of"]


QUERIES = 256
"""Queries of a planted prompt whose mass is measured, evenly spaced."""


class Heads(NamedTuple):
    """What an index keeps of planted heads.

    Parameters
    ----------
    density : (G,) share of the causal pairs read. mass : (G,) mean share of the attention kept.
    """

    density: Tensor
    mass: Tensor


def of_index(plant: Planted, index: KeyIndex) -> Heads:
    """Density and mass of every key-value head."""
    length = plant.key.shape[2]
    mask = index.mask()[0].expand(len(plant.plants), -1, -1)
    density = mask.sum((1, 2)) / (length * (length + 1) / 2)
    mass = kept_mass(plant.call, index, QUERIES).view(len(plant.plants), -1).mean(1)
    return Heads(density.float(), mass)


def on_planted(selector: Selector, plant: Planted, layer: int = 0) -> Heads:
    """What a selector keeps of a planted prompt."""
    length = plant.key.shape[2]
    return of_index(plant, selector.select(plant.call, Layout(1, length, length), layer))


def fixed(plant: Planted, method: AttentionMethod) -> Heads:
    """What a method that needs no model keeps of a planted prompt."""
    selector = method.plan(torch.nn.Module(), None, plant.key.shape[2])
    return on_planted(selector, plant)


def window_of(seed: int) -> Tokens:
    """One held-out window: 512 tokens, or the named model's own length."""
    length = 512 if here().model == "nano" else here().length
    tokens = heldout(3, length)
    row = seed % len(tokens.input_ids)
    return Tokens(tokens.input_ids[row][None], tokens.attention_mask[row][None])


def measured(method: AttentionMethod, tokens: Tokens) -> Sequence[Kept]:
    """What a method keeps of every layer in prefill."""
    with method.apply(nano().model, tokens) as work:
        return [row for row in work.measured or work.measure(tokens) if row.phase == "prefill"]


def controls(density: float, tokens: Tokens, seed: int) -> dict[str, float]:
    """Mass kept by a window with sinks and by random keys at the same density."""
    sparsity, length = max(0.0, 1.0 - density), tokens.length
    found = {
        "window": measured(StreamingLLM(sparsity=sparsity, length=length), tokens),
        "random": measured(RandomKeys(sparsity=sparsity, seed=seed, length=length), tokens),
    }
    return {name: sum(r.mass for r in rows) / len(rows) for name, rows in found.items()}
