"""Training batches of the recall language, made on token ids so that no accelerator waits.

A context is a shuffle of lines (needles, assignments, prose) or of words; questions and answers
follow it. Short sequences carry many questions each, so most tokens that can be known are asked
for. Every function draws from torch's generators on the batch's device and from ``random``.
Shapes: B = rows, N = lines, L = tokens a line has room for, T = tokens of a sequence.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.models.recall import language
from gossamer.models.recall.tokenizer import BEGIN, PADDING, build, vocabulary

__all__ = ["SHARES", "Batch", "Batches"]

COMMON, FREQUENT, OUTNUMBER = 10, 3, 10
"""Words to name in the two counting tasks; how often a common word comes per uncommon one."""
_PRIME = 28_879
"""The largest prime not above the number of names: multiples of any step visit every name."""

SHARES = {"one": 8, "several": 3, "all": 5, "trace": 5, "common": 2, "frequent": 2}
"""Rows of each task in a batch, in parts."""


class Batch(NamedTuple):
    """Sequences and which of their tokens answer a question.

    Parameters
    ----------
    ids : (B, T) int64, padded at the end. answers : (B, T) bool. task : name of each row.
    """

    ids: Tensor
    answers: Tensor
    task: list[str]


class Batches:
    """Draws batches.

    Parameters
    ----------
    device : where they are made. seed : of every draw.
    share : most of a sequence's tokens spent on questions and answers.
    questions : most questions of a sequence.
    """

    def __init__(
        self, device: torch.device, seed: int, share: float = 0.45, questions: int = 64
    ) -> None:
        self.device, self.share, self.questions = device, share, questions
        self.random = Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.known = vocabulary()
        self._tokenizer = build()
        shuffled = torch.randperm(_PRIME, generator=torch.Generator().manual_seed(7))
        self._names = shuffled.to(device)

    # --- words ---------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids[1:]

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self.generator)

    def _int(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=self.device, generator=self.generator)

    def _order(self, rows: int, count: int) -> Tensor:
        return self._rand(rows, count).argsort(1)

    @cached_property
    def _pieces(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Ids of syllables with and without space, digit pairs likewise, single digits."""
        pairs = [f"{n:02d}" for n in range(100)]
        groups = (
            ["\u2581" + s for s in language.SYLLABLES],
            language.SYLLABLES,
            ["\u2581" + p for p in pairs],
            pairs,
            "0123456789",
        )
        first, later, one, two, single = (
            torch.tensor([self.known[t] for t in group], device=self.device) for group in groups
        )
        return first, later, one, two, single

    def names(self, rows: int, count: int) -> Tensor:
        """(B, count, 2) ids of names, none twice in a row."""
        step, start = self._int(1, _PRIME, rows, 1), self._int(0, _PRIME, rows, 1)
        place = (step * torch.arange(count, device=self.device) + start) % _PRIME
        number = self._names[place]
        many = len(language.SYLLABLES)
        first, later = self._pieces[:2]
        return torch.stack([first[number // many], later[number % many]], dim=-1)

    def values(self, rows: int, count: int) -> Tensor:
        """(B, count, 4) ids of seven-digit numbers."""
        _, _, one, two, single = self._pieces
        pairs = self._int(0, 100, rows, count, 3)
        last = single[self._int(0, 10, rows, count)]
        return torch.stack([one[pairs[..., 0]], *two[pairs[..., 1:]].unbind(-1), last], dim=-1)

    @cached_property
    def _nouns(self) -> Tensor:
        return torch.tensor([self.known["\u2581" + w] for w in language.NOUNS], device=self.device)

    def fill(self, template: str, **slots: Tensor) -> Tensor:
        """(B, N, L) ids of a template with its slots' ids (B, N, ...) put in."""
        shape = next(iter(slots.values())).shape[:2]
        stand_ins = {"name": "baba", "other": "bebe", "value": "1234567", "names": "bibi"}
        ids = self._encode(template.format(**{k: stand_ins[k] for k in slots}))
        parts: list[Tensor] = []
        at = 0
        places = {self._find(ids, self._encode(stand_ins[k])): k for k in slots}
        while at < len(ids):
            if at in places:
                slot = slots[places[at]]
                at += len(self._encode(stand_ins[places[at]]))
                parts.append(slot)
            else:
                parts.append(torch.full((*shape, 1), ids[at], device=self.device))
                at += 1
        return torch.cat(parts, dim=-1)

    @staticmethod
    def _find(ids: list[int], part: list[int]) -> int:
        return next(i for i in range(len(ids)) if ids[i : i + len(part)] == part)

    @cached_property
    def _prose(self) -> tuple[Tensor, dict[int, Tensor]]:
        """(templates, L) ids, and the words a marker id stands for; -1 after the end."""
        pools = {"noun": language.NOUNS, "verb": language.VERBS, "adjective": language.ADJECTIVES}
        marker = {kind: -2 - i for i, kind in enumerate(pools)}
        words = {
            marker[kind]: torch.tensor([self.known["\u2581" + w] for w in pool], device=self.device)
            for kind, pool in pools.items()
        }
        rows: list[list[int]] = []
        for text in language.PROSE:
            row: list[int] = []
            for part in text.replace(".", " .").split():
                kind = part.strip("{}")
                row.append(marker[kind] if part != kind else self._word(part))
            rows.append(row)
        width = max(map(len, rows))
        table = torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=self.device)
        return table, words

    def _word(self, part: str) -> int:
        return self.known["." if part == "." else "\u2581" + part]

    def prose(self, rows: int, count: int) -> Tensor:
        """(B, count, L) ids of sentences, -1 after their end."""
        table, words = self._prose
        lines = table[self._int(0, len(table), rows, count)]
        for marker, pool in words.items():
            drawn = pool[self._int(0, len(pool), *lines.shape)]
            lines = torch.where(lines == marker, drawn, lines)
        return lines

    # --- assembly ------------------------------------------------------------------------------

    def context(self, lines: Sequence[Tensor], budget: int) -> Tensor:
        """(B, N, L): the lines among as much prose as fits, shuffled; left-out lines are -1."""
        rows = len(lines[0])
        prose = self.prose(rows, max(1, budget // 7))
        every = _stack([*lines, prose])
        fits = (every >= 0).sum(-1).cumsum(1) <= budget
        every = torch.where(fits[..., None], every, -1)
        order = self._order(rows, every.shape[1])
        return every.gather(1, order[..., None].expand_as(every))

    def finish(self, context: Tensor, asked: Tensor, answers: Tensor, length: int) -> Batch:
        """Sequences of a context (B, N, L), questions and answers (B, Q, L') each."""
        rows = len(context)
        both = torch.cat([asked, answers], dim=-1).flatten(1)
        mark = torch.cat([torch.zeros_like(asked), torch.ones_like(answers)], dim=-1).flatten(1)
        begin = torch.full((rows, 1), self.known[BEGIN], device=self.device)
        body = context.flatten(1)
        flat = torch.cat([begin, body, both], dim=1)
        marks = torch.cat([torch.zeros_like(begin), torch.zeros_like(body), mark], dim=1)
        real = flat >= 0
        place = torch.where(real, real.long().cumsum(1) - 1, length)
        # One place more than the length takes what is no token.
        ids = torch.full((rows, length + 1), self.known[PADDING], device=self.device)
        ids.scatter_(1, place, flat)
        found = torch.zeros_like(ids).scatter_(1, place, marks)
        assert int(place.masked_fill(~real, 0).max()) < length
        return Batch(ids[:, :length], found[:, :length].bool(), [])

    def joined(self, items: Tensor) -> Tensor:
        """(B, Q, k, w) items as (B, Q, k * (w + 1)): a comma after each, a full stop at the end."""
        comma = torch.full((*items.shape[:3], 1), self.known[","], device=self.device)
        comma[:, :, -1] = self.known["."]
        return torch.cat([items, comma], dim=-1).flatten(2)

    # --- tasks ---------------------------------------------------------------------------------

    def _between(self, low: int, high: int) -> int:
        """Any number of that range, small ones as often as large ones."""
        return round(math.exp(self.random.uniform(math.log(low), math.log(high))))

    def needles(self, kind: str, rows: int, length: int) -> Batch:
        """Numbers of names: one of a name, all of a name, or one each of several names."""
        room = int(length * self.share)
        most = max(2, min(4, room // 25))
        many = 1 if kind == "one" else self.random.randint(2, most)
        width = {"one": 17, "all": 13 + 5 * many, "several": 9 + 11 * many}[kind]
        questions = max(1, min(self.questions, room // width))
        budget = length - 1 - questions * width
        each = many if kind == "all" else 1
        asked = many if kind == "several" else 1
        most_keys = budget // (11 * each)
        least = min(most_keys, asked)
        few = min(most_keys, max(least, questions * asked))
        # How many numbers a lone name has, no other question of the sequence tells.
        alone = [1] * (4 if kind == "all" else 0)
        some = self._between(least, most_keys)
        keys = self.random.choice([most_keys, few, some, some, *alone])
        questions = max(1, min(questions, keys // asked))
        budget = length - 1 - questions * width
        names = self.names(rows, keys)
        values = self.values(rows, keys * each)
        owner = names.repeat_interleave(each, dim=1)
        lines = self.fill(language.TEMPLATES["needle"], name=owner, value=values)
        context = self.context([lines], budget)
        if each > 1:
            values = self._by_appearance(context, names, values, each)
        values = values.view(rows, keys, each, 4)
        pick = self._order(rows, keys)[:, : questions * asked]
        chosen = names.gather(1, pick[..., None].expand(-1, -1, 2))
        found = values.gather(1, pick[..., None, None].expand(-1, -1, each, 4))
        if kind != "several":
            question = self.fill(language.TEMPLATES[kind], name=chosen)
            return self.finish(context, question, self.joined(found), length)
        chosen = chosen.view(rows, questions, asked, 2)
        listed = self.joined(chosen)[..., :-1]
        question = self.fill(language.TEMPLATES[kind], names=listed)
        pairs = torch.cat([chosen, found.view(rows, questions, asked, 4)], dim=-1)
        return self.finish(context, question, self.joined(pairs), length)

    def _by_appearance(self, context: Tensor, names: Tensor, values: Tensor, each: int) -> Tensor:
        """The values of every name in the order in which the context tells them."""
        rows, keys = names.shape[:2]
        size = max(self.known.values()) + 1
        shown = context[..., 6:10].long()
        weight = torch.tensor([size**3, size**2, size, 1], device=self.device)
        # A value's number identifies its line; equal values of one name are told alike.
        code, wanted = (shown * weight).sum(-1), (values * weight).sum(-1)
        sorted_code, place = code.sort(dim=1, stable=True)
        at = torch.searchsorted(sorted_code, wanted).clamp_max(code.shape[1] - 1)
        line = place.gather(1, at).view(rows, keys, each)
        order = line.argsort(dim=2)
        grouped = values.view(rows, keys, each, 4)
        return grouped.gather(2, order[..., None].expand_as(grouped)).view(rows, -1, 4)

    def trace(self, rows: int, length: int) -> Batch:
        """Variables that hold a value through a chain of assignments, in the chain's order."""
        hops = self.random.randint(1, 4 if length >= 512 else 2)
        width = 12 + 3 * (hops + 1)
        questions = max(1, min(self.questions, int(length * self.share) // width))
        budget = length - 1 - questions * width
        most = max(1, budget // (9 + 8 * hops))
        few = min(most, questions)
        chains = self.random.choice([most, few, *[self._between(1, most)] * 2])
        chains = min(chains, 4096)
        questions = min(questions, chains)
        budget = length - 1 - questions * width
        names = self.names(rows, chains * (hops + 1))
        grid = names.view(rows, chains, hops + 1, 2)
        values = self.values(rows, chains)
        first = self.fill(language.TEMPLATES["set"], name=grid[:, :, 0], value=values)
        copies = self.fill(
            language.TEMPLATES["copy"],
            name=grid[:, :, 1:].flatten(1, 2),
            other=grid[:, :, :-1].flatten(1, 2),
        )
        context = self.context([first, copies], budget)
        pick = self._order(rows, chains)[:, :questions]
        question = self.fill(
            language.TEMPLATES["trace"],
            value=values.gather(1, pick[..., None].expand(-1, -1, 4)),
        )
        held = grid.gather(1, pick[..., None, None].expand(-1, -1, hops + 1, 2))
        return self.finish(context, question, self.joined(held), length)

    def count(self, kind: str, rows: int, length: int) -> Batch:
        """The words a list repeats most."""
        asked = torch.tensor([self._encode(language.TEMPLATES[kind])], device=self.device)
        top = COMMON if kind == "common" else FREQUENT
        budget = length - 1 - asked.shape[1] - 2 * top
        words = self._nouns[self._order(rows, len(self._nouns))]
        if kind == "common":
            often = min(OUTNUMBER, budget // (2 * COMMON))
            heavy = COMMON * often
            most = min(len(self._nouns) - COMMON, budget - heavy)
            rare = self.random.randint(most // 3 + 1, most)
            times = max(1, budget // (heavy + rare))
            repeats = torch.ones(COMMON + rare, dtype=torch.long, device=self.device)
            repeats[:COMMON] = often
            rank = torch.repeat_interleave(repeats * times).expand(rows, -1)
            drawn = words.gather(1, rank)
            answer = words[:, :COMMON]
        else:
            power = torch.arange(1, len(self._nouns) + 1, device=self.device).float() ** -2.0
            # By inversion: multinomial has a limit on the number of classes times draws.
            share = (power / power.sum()).cumsum(0)
            rank = torch.searchsorted(share, self._rand(rows, budget)).clamp_max(len(power) - 1)
            counts = torch.zeros(rows, len(power), device=self.device)
            counts.scatter_add_(1, rank, torch.ones_like(rank, dtype=counts.dtype))
            best = counts.topk(top, dim=1).indices
            drawn, answer = words.gather(1, rank), words.gather(1, best)
        order = self._order(rows, drawn.shape[1])
        context = drawn.gather(1, order)[..., None]
        question = asked[None].expand(rows, 1, -1)
        return self.finish(context, question, self.joined(answer[:, None, :, None]), length)

    def task(self, name: str, rows: int, length: int) -> Batch:
        """Rows of one task."""
        makers: dict[str, Callable[[int, int], Batch]] = {
            "trace": self.trace,
            "common": lambda b, t: self.count("common", b, t),
            "frequent": lambda b, t: self.count("frequent", b, t),
        }
        made = makers[name](rows, length) if name in makers else self.needles(name, rows, length)
        return made._replace(task=[name] * rows)

    def draw(self, rows: int, length: int) -> Batch:
        """A batch of all tasks, each with its share of the rows."""
        total = sum(SHARES.values())
        if rows < 2 * total:
            names = self.random.choices(list(SHARES), list(SHARES.values()), k=rows)
            counts = {name: names.count(name) for name in SHARES}
        else:
            counts = {name: rows * part // total for name, part in SHARES.items()}
            counts["one"] += rows - sum(counts.values())
        parts = [self.task(name, count, length) for name, count in counts.items() if count]
        return Batch(
            torch.cat([p.ids for p in parts]),
            torch.cat([p.answers for p in parts]),
            [task for p in parts for task in p.task],
        )


def _stack(lines: Sequence[Tensor]) -> Tensor:
    """Lines of different widths as one (B, N, L), -1 after their end."""
    width = max(line.shape[-1] for line in lines)
    return torch.cat(
        [torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1) for x in lines], dim=1
    )
