"""The tasks: what is hidden in a long context, and what is asked about it.

RULER's families (arXiv:2404.06654) on text from our own grammar. A task makes a *draft*: units of
text in order, each marked as evidence or filler, then a question and its answer. How many units
make a prompt of so many tokens is :mod:`gossamer.evaluate.long_context.fit`'s business.

Two axes of The Sparse Frontier (arXiv:2504.17768) are recorded with every task. *Scope*: how much
of the context is evidence. *Dispersion*: over how many places the evidence is spread, and so how
many must be found for one answer.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from gossamer.core import GossamerError, unknown
from gossamer.models.recall import language

__all__ = ["TASKS", "Draft", "Task", "find_task", "variable_tracking"]

Level = Literal["low", "high"]

COMMON, FREQUENT, OUTNUMBER = 10, 3, 10
"""Words asked for in the two counting tasks; how often a common word comes per uncommon one."""


@dataclass(frozen=True)
class Draft:
    """A prompt before it is fitted.

    Parameters
    ----------
    units : lines or words, in order. needed : units that must not be left out.
    evidence : units that the answer depends on.
    question, answers : what is asked; every answer must be said, in any order.
    answer : the answers as one text, in the order and form the question asks for.
    """

    units: tuple[str, ...]
    needed: frozenset[int]
    evidence: frozenset[int]
    question: str
    answers: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Task:
    """A family of prompts.

    Parameters
    ----------
    name : of the task. make : (random numbers, units wanted, units at the end without evidence)
        to a draft. scope, dispersion : see the module.
    least : fewest units that make sense.
    """

    name: str
    make: Callable[[Random, int, int], Draft] = field(repr=False)
    scope: Level
    dispersion: Level
    least: int


def _names(random: Random, count: int) -> list[str]:
    total = len(language.SYLLABLES) ** 2
    if count > total:
        raise GossamerError(f"{count} different names are wanted and there are {total}; ask less")
    return [language.name(i) for i in random.sample(range(total), count)]


def _value(random: Random) -> str:
    return language.value(random.randrange(10**language.VALUE_DIGITS))


def _prose(random: Random) -> str:
    # Slots are drawn one by one: a template may name a kind of word twice.
    words: list[str] = []
    pools = {"noun": language.NOUNS, "verb": language.VERBS, "adjective": language.ADJECTIVES}
    for word in random.choice(language.PROSE).split():
        slot = word.strip("{}.")
        drawn = random.choice(pools[slot]) if slot in pools and "{" in word else slot
        words.append(drawn + ("." if word.endswith(".") else ""))
    return " ".join(words)


def _needle(name: str, value: str) -> str:
    return language.TEMPLATES["needle"].format(name=name, value=value)


def _mix(
    random: Random, lines: Sequence[str], filler: Sequence[str], clear: int
) -> tuple[tuple[str, ...], list[int]]:
    """Units with the lines at random places among the filler, and where each line went.

    The last ``clear`` units are filler.
    """
    total = len(lines) + len(filler)
    if clear > len(filler):
        raise GossamerError(
            f"{clear} units at the end are to stay clear and there are {len(filler)} of filler; "
            "give a longer length"
        )
    places = random.sample(range(total - clear), len(lines))
    units, rest = [""] * total, iter(filler)
    for place, line in zip(places, lines, strict=True):
        units[place] = line
    return tuple(unit or next(rest) for unit in units), places


def _question(kind: str, **slots: str) -> str:
    return language.TEMPLATES[kind].format(**slots)


def _in_prose(random: Random, lines: Sequence[str], size: int, clear: int):
    filler = [_prose(random) for _ in range(max(size - len(lines), clear))]
    return _mix(random, lines, filler, clear)


def _single(random: Random, size: int, clear: int) -> Draft:
    (name,), value = _names(random, 1), _value(random)
    units, places = _in_prose(random, [_needle(name, value)], size, clear)
    one = frozenset(places)
    return Draft(units, one, one, _question("one", name=name), (value,), value + ".")


def _multikey(random: Random, size: int, clear: int) -> Draft:
    names = _names(random, size)
    lines = [_needle(name, _value(random)) for name in names]
    place = random.randrange(max(1, size - clear))
    value = lines[place].rstrip(".").split()[-1]
    one = frozenset({place})
    question = _question("one", name=names[place])
    return Draft(tuple(lines), one, one, question, (value,), value + ".")


def _multivalue(random: Random, size: int, clear: int) -> Draft:
    (name,), values = _names(random, 1), [_value(random) for _ in range(4)]
    units, places = _in_prose(random, [_needle(name, v) for v in values], size, clear)
    told = tuple(v for _, v in sorted(zip(places, values, strict=True)))
    four = frozenset(places)
    return Draft(units, four, four, _question("all", name=name), told, ", ".join(told) + ".")


def _multiquery(random: Random, size: int, clear: int) -> Draft:
    names = _names(random, 4)
    values = [_value(random) for _ in names]
    lines = [_needle(*pair) for pair in zip(names, values, strict=True)]
    units, places = _in_prose(random, lines, size, clear)
    answer = ", ".join(f"{n} {v}" for n, v in zip(names, values, strict=True)) + "."
    four, question = frozenset(places), _question("several", names=", ".join(names))
    return Draft(units, four, four, question, tuple(values), answer)


def variable_tracking(chains: int = 8, hops: int = 4) -> Task:
    """Chains of assignments, shuffled into prose; which variables hold the first one's value?

    Parameters
    ----------
    chains : chains in the context, one of which is asked about. hops : copies in each.
    """
    if chains < 1 or hops < 1:
        raise GossamerError(f"{chains} chains of {hops} hops make no task; give at least 1 of each")

    def make(random: Random, size: int, clear: int) -> Draft:
        names = _names(random, chains * (hops + 1))
        values = [_value(random) for _ in range(chains)]
        lines: list[str] = []
        for i, value in enumerate(values):
            chain = names[i * (hops + 1) : (i + 1) * (hops + 1)]
            lines.append(language.TEMPLATES["set"].format(name=chain[0], value=value))
            for name, other in zip(chain[1:], chain, strict=False):
                lines.append(language.TEMPLATES["copy"].format(name=name, other=other))
        units, places = _in_prose(random, lines, size, clear)
        held = tuple(names[: hops + 1])
        return Draft(
            units,
            frozenset(places),
            frozenset(places[: hops + 1]),
            _question("trace", value=values[0]),
            held,
            ", ".join(held) + ".",
        )

    return Task("variable_tracking", make, "low", "high", chains * (hops + 1))


def _common(random: Random, size: int, clear: int) -> Draft:
    words = random.sample(language.NOUNS, len(language.NOUNS))
    rare = min(len(words) - COMMON, max(1, size - COMMON * OUTNUMBER))
    times = max(1, size // (COMMON * OUTNUMBER + rare))
    top = tuple(words[:COMMON])
    units = [w for w in top for _ in range(OUTNUMBER * times)]
    units += [w for w in words[COMMON : COMMON + rare] for _ in range(times)]
    random.shuffle(units)
    return _counted(units, top, "common")


def _frequent(random: Random, size: int, clear: int) -> Draft:
    words = random.sample(language.NOUNS, len(language.NOUNS))
    weights = [(rank + 1) ** -2.0 for rank in range(len(words))]
    while True:
        units = random.choices(words, weights, k=size)
        ranked = Counter(units).most_common()
        # A tie at the border would leave the answer open.
        if len(ranked) <= FREQUENT or ranked[FREQUENT - 1][1] > ranked[FREQUENT][1]:
            break
    return _counted(units, tuple(word for word, _ in ranked[:FREQUENT]), "frequent")


def _counted(units: Sequence[str], top: tuple[str, ...], kind: str) -> Draft:
    every = frozenset(range(len(units)))
    return Draft(tuple(units), every, every, _question(kind), top, ", ".join(top) + ".")


_LIST = (
    Task("niah_single", _single, "low", "low", 1),
    Task("niah_multikey", _multikey, "low", "low", 4),
    Task("niah_multivalue", _multivalue, "low", "high", 4),
    Task("niah_multiquery", _multiquery, "low", "high", 4),
    variable_tracking(),
    Task("common_words", _common, "high", "high", 120),
    Task("frequent_words", _frequent, "high", "low", 30),
)
TASKS: dict[str, Task] = {task.name: task for task in _LIST}
"""The suite, by name."""


def find_task(name: str) -> Task:
    """The task of that name; ``variable_tracking:1x4`` sets its chains and hops.

    Raises
    ------
    GossamerError
        For an unknown task.
    """
    base, _, size = name.partition(":")
    if base not in TASKS:
        raise unknown("task", name, tuple(TASKS))
    if not size:
        return TASKS[base]
    parts = size.split("x")
    if base != "variable_tracking" or len(parts) != 2 or not all(p.isdecimal() for p in parts):
        raise GossamerError(f"task {name!r} cannot be read; write it as variable_tracking:8x4")
    return variable_tracking(int(parts[0]), int(parts[1]))
