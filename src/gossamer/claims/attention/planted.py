"""Queries and keys with a known attention pattern planted in every head.

Each key-value head gets one pattern; the heads that share it attend alike, with noise of their
own. Which pairs were planted is known, so a selector can be judged without a model.
Shapes: G = key-value heads, R = query heads per key-value head, T = tokens, D = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.core import unknown
from gossamer.methods.attention.executor import Call

__all__ = ["Plant", "Planted", "planted"]

Plant = Literal[
    "sink+band", "band", "columns+diagonals", "blocks", "needle", "smooth", "zipf", "noise"
]

HEIGHT = 16.0
"""Score of a planted pair, in nats above the background's mean."""
SINKS, COLUMNS, LAGS, BLOCKS = 4, 3, 2, 4
BLOCK = 64
"""Tokens of a planted block of keys."""


@dataclass(frozen=True, eq=False)
class Planted:
    """One attention call of known pattern.

    Parameters
    ----------
    query : (1, G * R, T, D). key, value : (1, G, T, D).
    plants : the pattern of every key-value head.
    kept : bool, (G, T, T), the planted pairs; all causal pairs of a head without a pattern.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    plants: tuple[Plant, ...]
    kept: Tensor

    @property
    def call(self) -> Call:
        """As executors and selectors take it."""
        return Call(self.query, self.key, self.value)


def planted(
    plants: Sequence[Plant],
    length: int = 2048,
    *,
    width: int = 128,
    repeat: int = 1,
    seed: int = 0,
    places: int | None = None,
) -> Planted:
    """Plant one pattern per key-value head.

    Parameters
    ----------
    plants : ``sink+band``: the first 4 keys and a band of about length / 32 latest keys.
        ``band``: the band alone. ``columns+diagonals``: 3 keys that every later query reads, and
        the keys exactly 2 lags back. ``blocks``: every 64 queries read 4 earlier 64-key blocks of
        their own. ``needle``: the band, and one stretch of 8 keys read by the last eighth of the
        queries. ``smooth``: neighbouring keys are alike (a random walk), every query reads near
        one key. ``zipf``: keys weigh as 1 over their rank, the same ones for all queries up to
        noise. ``noise``: no pattern, all scores alike up to noise.
    repeat : R. seed : of the codes and the noise. places : seed of the columns', lags', blocks'
        and needles' places; None takes ``seed``. Two calls that differ in it only are two
        prompts whose patterns lie elsewhere.

    >>> p = planted(["band", "blocks"], 256, repeat=2)
    >>> p.query.shape, p.key.shape, p.kept.shape
    (torch.Size([1, 4, 256, 128]), torch.Size([1, 2, 256, 128]), torch.Size([2, 256, 256]))
    """
    code = torch.Generator().manual_seed(seed)
    place = torch.Generator().manual_seed(7919 + (seed if places is None else places))
    queries, keys, maps = [], [], []
    for plant in plants:
        if plant not in get_args(Plant):
            raise unknown("plant", plant, get_args(Plant))
        query, key, kept = _head(plant, length, width, code, place)
        # The heads of a group differ a little, as trained ones do.
        stir = torch.randn(repeat, length, width, generator=code) * (0.02 * HEIGHT)
        queries.append(query * width**0.5 + stir)
        keys.append(key)
        maps.append(kept & torch.ones(length, length, dtype=torch.bool).tril())
    value = torch.randn(1, len(plants), length, width, generator=code)
    query = torch.stack(queries).flatten(0, 1)[None]
    return Planted(query, torch.stack(keys)[None], value, tuple(plants), torch.stack(maps))


def _codes(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Random unit vectors, nearly orthogonal."""
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def _band(length: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes whose inner product falls off with distance like a bell, and the kept pairs."""
    reach = max(length // 32, 2)
    # Random features of a Gaussian kernel; half its height is lost at a distance of reach / 4.
    frequency = torch.randn(width // 2, generator=generator) * (4.0 / reach)
    angle = torch.arange(length)[:, None] * frequency
    codes = torch.cat([angle.cos(), angle.sin()], dim=1) * (width // 2) ** -0.5
    at = torch.arange(length)
    return codes, (at[:, None] - at) < reach


def _head(
    plant: Plant, length: int, width: int, code: torch.Generator, place: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (T, D) and key (T, D) with q . k the score in nats, and the planted pairs (T, T)."""
    at = torch.arange(length)
    if plant == "noise":
        query = torch.randn(length, width, generator=code) * width**-0.5
        return query, torch.randn(length, width, generator=code), torch.ones(length, length).bool()
    if plant == "smooth":
        walk = torch.randn(length, width, generator=code).cumsum(0)
        key = torch.nn.functional.normalize(walk - walk.mean(0), dim=1)
        target = (torch.rand(length, generator=place) * (at + 1)).long()
        return 2 * HEIGHT * key[target], key, at[:, None] == at  # the peak, not a set, is planted
    if plant == "zipf":
        # The logarithm of 1 / rank, shifted to end at 0.
        salience = (length / (torch.randperm(length, generator=place) + 1.0)).log()
        key = torch.randn(length, width, generator=code) * 0.3
        query = torch.randn(length, width, generator=code) * width**-0.5
        query[:, 0], key[:, 0] = 1.0, salience
        return query, key, torch.ones(length, length).bool()
    if plant == "columns+diagonals":
        return _columns_diagonals(length, width, code, place)
    if plant == "blocks":
        return _blocks(length, width, code, place)
    codes, kept = _band(length, width - 2, code)
    extra_query, extra_key = torch.zeros(length, 2), torch.zeros(length, 2)
    if plant == "sink+band":
        extra_query[:, 0], extra_key[:SINKS, 0] = HEIGHT + 2.0, 1.0
        kept = kept | (at < SINKS)
    elif plant == "needle":
        low = int(torch.randint(length // 8, length // 2, (1,), generator=place))
        asks = at >= length - length // 8
        extra_query[asks, 1], extra_key[low : low + 8, 1] = HEIGHT + 2.0, 1.0
        kept = kept | (asks[:, None] & (at >= low) & (at < low + 8))
    query = torch.cat([HEIGHT * codes, extra_query], dim=1)
    return query, torch.cat([codes, extra_key], dim=1), kept


def _columns_diagonals(
    length: int, width: int, code: torch.Generator, place: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    codes, at = _codes(length, width - 1, code), torch.arange(length)
    # One column early, so that nearly every row has one; the others anywhere in the first half.
    columns = torch.randint(length // 16, length // 2, (COLUMNS,), generator=place)
    columns[0] = torch.randint(0, length // 64 + 1, (1,), generator=place)
    lags = torch.randint(length // 16, length // 4, (LAGS,), generator=place)
    query, kept = torch.zeros(length, width), torch.zeros(length, length, dtype=torch.bool)
    for lag in lags.tolist():
        query[lag:, 1:] += HEIGHT * codes[: length - lag]
        kept |= (at[:, None] - at) == lag
    query[:, 0] = HEIGHT
    key = torch.cat([torch.zeros(length, 1), codes], dim=1)
    key[columns, 0] = 1.0
    kept[:, columns] = True
    return query, key, kept


def _blocks(
    length: int, width: int, code: torch.Generator, place: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    size = min(BLOCK, max(length // 16, 1))
    count = -(-length // size)
    codes = _codes(count, width, code)
    rank = torch.rand(count, count, generator=place).tril()
    chosen = torch.zeros(count, count, dtype=torch.bool)
    chosen.scatter_(1, rank.topk(min(BLOCKS, count), dim=1).indices, True)
    chosen = chosen.tril()
    spread = chosen.repeat_interleave(size, 0)[:length]
    query = HEIGHT * (spread.float() @ codes)
    key = codes.repeat_interleave(size, 0)[:length]
    return query, key, spread.repeat_interleave(size, 1)[:, :length]
