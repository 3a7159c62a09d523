"""Templated tasks whose attributes, answers and corrupted twins are known.

Every example is a short sentence of whole-word tokens that ends just before its answer. What the
sentence is about lies in named *attributes* (which name comes first, which year, which feeling),
so that an analysis can be held against the truth. A *corrupted* twin has the same length and shape
but no longer determines the answer.

- ``names``: indirect object identification. Of two names the one that is not repeated follows.
- ``years``: a span's second year is larger than its first; any larger one is right.
- ``arguments``: the docstring names a function's arguments in order; the next one follows.
- ``feelings``: the word of feeling at the start decides among the words that close the sentence.
- ``topics``: filler words of one of four topics; nothing to answer but the topic itself.

Source of the first three: Wang et al. 2022 (arXiv:2211.00593), Hanna et al. 2023
(arXiv:2305.00586), Heimersheim and Janiak 2023; sentences are our own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gossamer.core import GossamerError, unknown

__all__ = ["TASKS", "Examples", "batch", "encode", "vocabulary", "words"]

TASKS = ("names", "years", "arguments", "feelings", "topics")

NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gwen", "Hugo", "Iris", "Jon"),
    *("Kim", "Lea", "Max", "Nora", "Otto", "Pia", "Rob", "Sue", "Tom", "Uma"),
)
PLACES = ("park", "shop", "school", "station", "garden", "office")
OBJECTS = ("book", "ring", "lamp", "key", "drum", "kite")
EVENTS = ("siege", "voyage", "strike", "drought", "reign", "feud")
LETTERS = tuple("bcdefghklmnpqrst")
FEELINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "joy": (("happy", "glad", "merry", "cheerful"), ("smiled", "danced", "laughed")),
    "sadness": (("sad", "gloomy", "tearful", "mournful"), ("wept", "sighed", "sobbed")),
    "anger": (("angry", "furious", "cross", "irate"), ("shouted", "stamped", "cursed")),
    "fear": (("afraid", "scared", "anxious", "timid"), ("trembled", "hid", "fled")),
}
TOPICS: Mapping[str, tuple[str, ...]] = {
    "sea": ("wave", "sail", "harbour", "anchor", "tide", "gull", "reef", "salt"),
    "kitchen": ("oven", "flour", "butter", "spoon", "kettle", "onion", "bread", "plate"),
    "forest": ("oak", "moss", "deer", "fern", "owl", "trail", "acorn", "bark"),
    "music": ("chord", "violin", "rhythm", "choir", "tune", "flute", "tempo", "stage"),
}
_GLUE = (
    *("<pad>", "<s>", "when", "and", "went", "to", "the", ",", "gave", "a", "lasted", "from"),
    *("year", "until", "def", "(", ")", ":", "param", "felt", "so", "."),
)
_FIRST_YEAR, _YEARS = 10, 80
_SHAPES = 2
_ARGUMENTS = 3
_TOPIC_LENGTH = 15


@dataclass(frozen=True)
class Examples:
    """Some examples of one task, all of one length.

    Parameters
    ----------
    task : its name. ids : int64 (N, T), ending before the answer.
    answer : int64 (N,), the right next token; -1 where the task has none.
    wrong : int64 (N,), the token a model that missed the point would say.
    right : bool (N, V), every next token that is right.
    corrupted : int64 (N, T), twins that do not determine the answer.
    attributes : name to int64 (N,) value of each.
    """

    task: str
    ids: Tensor
    answer: Tensor
    wrong: Tensor
    right: Tensor
    corrupted: Tensor
    attributes: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.ids)


@cache
def words() -> tuple[str, ...]:
    """The vocabulary: token i is word i."""
    years = tuple(str(_FIRST_YEAR + i) for i in range(_YEARS))
    felt = tuple(w for pair in FEELINGS.values() for group in pair for w in group)
    said = tuple(w for group in TOPICS.values() for w in group)
    return (*_GLUE, *NAMES, *PLACES, *OBJECTS, *EVENTS, *years, *LETTERS, *felt, *said)


@cache
def vocabulary() -> dict[str, int]:
    """Word to token."""
    assert len(set(words())) == len(words())
    return {word: i for i, word in enumerate(words())}


def encode(text: str) -> list[int]:
    """Tokens of words joined by blanks.

    Raises
    ------
    GossamerError
        For a word outside the vocabulary, offering the nearest.
    """
    for word in text.split():
        if word not in vocabulary():
            raise unknown("word", word, words())
    return [vocabulary()[word] for word in text.split()]


def batch(task: str, count: int, seed: int = 0) -> Examples:
    """Examples of a task, drawn by a seed.

    Raises
    ------
    GossamerError
        For an unknown task or a count below 1.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if count < 1:
        raise GossamerError(f"count is {count}; ask for at least one example")
    draw = _Draw(count, torch.Generator().manual_seed(seed))
    return _MAKERS[task](draw)


class _Draw:
    """Draws columns of tokens for all examples at once."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator

    def number(self, high: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, (self.count,), generator=self.generator)

    def distinct(self, high: int, many: int) -> Tensor:
        """(N, many) numbers below ``high``, no two alike in a row."""
        noise = torch.rand(self.count, high, generator=self.generator)
        return noise.argsort(1)[:, :many]

    def word(self, of: tuple[str, ...]) -> Tensor:
        return _tokens(of)[self.number(len(of))]

    def lay(self, *columns: str | Tensor) -> Tensor:
        """(N, T): words are the same in all rows, tensors are columns."""
        made: list[Tensor] = []
        for column in columns:
            if isinstance(column, str):
                made += [torch.full((self.count,), token) for token in encode(column)]
            else:
                made.append(column)
        return torch.stack(made, dim=1)


def _tokens(of: tuple[str, ...]) -> Tensor:
    return torch.tensor([vocabulary()[word] for word in of])


def _one_right(answer: Tensor) -> Tensor:
    right = torch.zeros(len(answer), len(words()), dtype=torch.bool)
    return right.scatter_(1, answer[:, None], True)


def _names(draw: _Draw) -> Examples:
    who, shape = draw.distinct(len(NAMES), 3), draw.number(_SHAPES)
    place, thing = draw.word(PLACES), draw.word(OBJECTS)
    one, other, third = _tokens(NAMES)[who].unbind(1)
    first = torch.where(shape == 0, one, other)
    second = torch.where(shape == 0, other, one)

    def sentence(giver: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ends = (giver, "gave a", thing, "to")
        return draw.lay("<s> when", a, "and", b, "went to the", place, ",", *ends)

    return Examples(
        "names",
        sentence(one, first, second),
        answer=other,
        wrong=one,
        right=_one_right(other),
        corrupted=sentence(third, first, second),
        attributes={
            "subject": who[:, 0],
            "indirect object": who[:, 1],
            "order": shape,
            "stranger": who[:, 2],
        },
    )


def _years(draw: _Draw) -> Examples:
    event = draw.word(EVENTS)
    year = draw.number(_YEARS - 1)
    lot = torch.rand(draw.count, generator=draw.generator)
    larger = year + 1 + (lot * (_YEARS - 1 - year)).long()
    numbers = _tokens(tuple(str(_FIRST_YEAR + i) for i in range(_YEARS)))
    right = torch.zeros(draw.count, len(words()), dtype=torch.bool)
    right[:, numbers] = torch.arange(_YEARS) > year[:, None]

    def sentence(start: Tensor) -> Tensor:
        return draw.lay("<s> the", event, "lasted from the year", start, "until the year")

    return Examples(
        "years",
        sentence(numbers[year]),
        answer=numbers[larger],
        wrong=numbers[0].expand(draw.count),
        right=right,
        # The smallest year excludes nothing but itself.
        corrupted=sentence(numbers[0].expand(draw.count)),
        attributes={"year": year},
    )


def _arguments(draw: _Draw) -> Examples:
    letters = _tokens(LETTERS)[draw.distinct(len(LETTERS), 2 * _ARGUMENTS)]
    a, b, c, x, y, z = letters.unbind(1)

    def sentence(p: Tensor, q: Tensor, r: Tensor) -> Tensor:
        return draw.lay("<s> def (", p, ",", q, ",", r, ") : param", a, "param", b, "param")

    return Examples(
        "arguments",
        sentence(a, b, c),
        answer=c,
        wrong=a,
        right=_one_right(c),
        corrupted=sentence(x, y, z),
        attributes={"third": c - int(_tokens(LETTERS)[0])},
    )


def _feelings(draw: _Draw) -> Examples:
    feeling, name, place = draw.number(len(FEELINGS)), draw.word(NAMES), draw.word(PLACES)
    said = torch.stack([_tokens(pair[0]) for pair in FEELINGS.values()])
    done = torch.stack([_tokens(pair[1]) for pair in FEELINGS.values()])
    word = draw.number(said.shape[1])
    act = draw.number(done.shape[1])
    other = (feeling + 1 + draw.number(len(FEELINGS) - 1)) % len(FEELINGS)
    right = torch.zeros(draw.count, len(words()), dtype=torch.bool)
    right.scatter_(1, done[feeling], True)

    def sentence(felt: Tensor) -> Tensor:
        return draw.lay("<s>", name, "felt", felt, "and went to the", place, "so", name)

    return Examples(
        "feelings",
        sentence(said[feeling, word]),
        answer=done[feeling, act],
        wrong=done[other, act],
        right=right,
        # A name says nothing about a feeling.
        corrupted=sentence(draw.word(NAMES)),
        attributes={"feeling": feeling, "word": feeling * said.shape[1] + word},
    )


def _topics(draw: _Draw) -> Examples:
    topic = draw.number(len(TOPICS))
    said = torch.stack([_tokens(group) for group in TOPICS.values()])
    # A third of the words is from any topic, so that no single word decides.
    own = torch.rand(draw.count, _TOPIC_LENGTH, generator=draw.generator) > 1 / 3
    lot = torch.randint(said.numel(), own.shape, generator=draw.generator)
    word = torch.randint(said.shape[1], own.shape, generator=draw.generator)
    chosen = torch.where(own, said[topic[:, None], word], said.flatten()[lot])
    start = torch.full((draw.count, 1), vocabulary()["<s>"])
    right = torch.zeros(draw.count, len(words()), dtype=torch.bool)
    right.scatter_(1, said[topic], True)
    return Examples(
        "topics",
        torch.cat([start, chosen], dim=1),
        answer=torch.full((draw.count,), -1),
        wrong=torch.full((draw.count,), -1),
        right=right,
        corrupted=torch.cat([start, said.flatten()[lot]], dim=1),
        attributes={"topic": topic},
    )


_MAKERS = {
    "names": _names,
    "years": _years,
    "arguments": _arguments,
    "feelings": _feelings,
    "topics": _topics,
}
