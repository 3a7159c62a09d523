"""Pairs: examples a task can be solved on, and twins it cannot be solved on."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.models import Tokens, as_tokens
from gossamer.models.templates import Examples

__all__ = ["Pairs", "as_pairs"]


class Pairs(NamedTuple):
    """Two sets of examples that are alike but for what a task needs.

    Parameters
    ----------
    positive, negative : windows of the same shape.
    """

    positive: Tokens
    negative: Tokens


def as_pairs(data: Any, model: nn.Module, seed: int = 0) -> Pairs:
    """Examples in the form that circuits are looked for in.

    Parameters
    ----------
    data : templated examples, which bring their corrupted twins; two sets of tokens or texts,
        solvable and not; or one set, whose twins are made by shuffling the tokens of each window.

    Raises
    ------
    GossamerError
        If the sets differ in shape, or fewer than 2 examples are left.
    """
    if isinstance(data, Examples):
        pairs = Pairs(Tokens.from_ids(data.ids), Tokens.from_ids(data.corrupted))
    elif isinstance(data, tuple) and len(data) == 2:
        pairs = Pairs(*(as_tokens(part, model, seed=seed) for part in data))
    else:
        tokens = as_tokens(data, model, seed=seed)
        pairs = Pairs(tokens, _shuffled(tokens, seed))
    one, other = (tuple(part.input_ids.shape) for part in pairs)
    if one != other:
        raise GossamerError(
            f"{one} solvable and {other} corrupted tokens do not pair up; give as many windows of "
            "the same length"
        )
    if one[0] < 2:
        raise GossamerError(f"{one[0]} example tells nothing apart; give at least 2")
    if not all(bool(part.attention_mask.all()) for part in pairs):
        raise GossamerError(
            "examples of unequal length have their answers at unequal places; give windows "
            "without padding"
        )
    return pairs


def _shuffled(tokens: Tokens, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(tokens.input_ids.shape, generator=generator)
    ids: Tensor = tokens.input_ids.gather(1, noise.argsort(1))
    return Tokens(ids, tokens.attention_mask)
