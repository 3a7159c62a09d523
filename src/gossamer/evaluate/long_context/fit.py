"""Fitting: prompts of as many tokens as wanted, for any tokenizer.

Tokens grow with the units of a task almost in proportion, so two drafts tell how many units fill
a length; a bisection on that estimate finds the number once per tokenizer, task and length, and
every prompt is encoded exactly once, then loses filler until it fits.
"""

from bisect import bisect_right
from dataclasses import dataclass
from random import Random
from typing import Any
from weakref import WeakKeyDictionary

from gossamer.core import GossamerError, check_count
from gossamer.evaluate.long_context.tasks import TASKS, Draft, Task, find_task

__all__ = ["Sample", "samples", "suite"]


@dataclass(frozen=True)
class Sample:
    """A question about a long context, in tokens.

    Parameters
    ----------
    task : its name. seed, index : which one of the task's it is.
    context, question : texts. answer : the answers as one text. answers : what must be said.
    ids : of context and question, special tokens included. split : tokens of the context.
    answer_ids : of ``answer``.
    depths : where the evidence stands, 0 at the begin and 1 at the end of the context; for tasks
        whose whole context is evidence, empty.
    clear : tokens between the last evidence and the question; evidence at least a window before
        the end is invisible to what observes that window.
    """

    task: str
    seed: int
    index: int
    context: str
    question: str
    answer: str
    answers: tuple[str, ...]
    ids: tuple[int, ...]
    split: int
    answer_ids: tuple[int, ...]
    depths: tuple[float, ...]
    clear: int

    @property
    def prompt(self) -> str:
        """Context and question as one text."""
        return f"{self.context} {self.question}"

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids)


@dataclass(frozen=True)
class _Line:
    """Tokens of a task's drafts as a straight line of their units."""

    start: float
    each: float

    def __call__(self, size: int) -> float:
        return self.start + self.each * size


_LINES: "WeakKeyDictionary[Any, dict[str, _Line]]" = WeakKeyDictionary()


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _ids(tokenizer: Any, draft: Draft) -> tuple[list[int], list[int]]:
    """Tokens of the context and of the question behind it."""
    context = _encode(tokenizer, " ".join(draft.units), True)
    end = getattr(tokenizer, "eos_token_id", None)
    if context and context[-1] == end and end is not None:
        context.pop()  # A tokenizer that closes texts would end the prompt before its question.
    return context, _encode(tokenizer, " " + draft.question, False)


def _key(task: Task) -> str:
    return f"{task.name}:{task.least}"


def _line(tokenizer: Any, task: Task) -> _Line:
    lines = _LINES.setdefault(tokenizer, {})
    if _key(task) not in lines:
        points: list[tuple[int, int]] = []
        for size in (task.least + 32, task.least + 256):
            draft = task.make(Random(0), size, 0)
            points.append((len(draft.units), sum(map(len, _ids(tokenizer, draft)))))
        (low, few), (high, many) = points
        each = (many - few) / max(1, high - low)
        lines[_key(task)] = _Line(few - each * low, each)
    return lines[_key(task)]


def _size(tokenizer: Any, task: Task, room: int) -> int:
    """Most units whose estimated tokens fit."""
    line = _line(tokenizer, task)
    # bisect counts the sizes whose estimate is at most the room.
    return bisect_right(range(1, room + 1), room, key=line)


def _drop(draft: Draft, count: int) -> Draft | None:
    """The draft without the first ``count`` units that are not needed; None if there are fewer."""
    spare = [i for i in range(len(draft.units)) if i not in draft.needed]
    gone = set(spare[:count])
    if len(spare) < count:
        return None
    left = [i for i in range(len(draft.units)) if i not in gone]
    place = {old: new for new, old in enumerate(left)}
    return Draft(
        tuple(draft.units[i] for i in left),
        frozenset(place[i] for i in draft.needed),
        frozenset(place[i] for i in draft.evidence),
        draft.question,
        draft.answers,
        draft.answer,
    )


def _fitted(
    tokenizer: Any, task: Task, room: int, stream: str, size: int, clear: int
) -> tuple[Draft, list[int], list[int]]:
    line = _line(tokenizer, task)
    while size >= task.least:
        units_clear = -(-clear // max(1, int(line.each))) + 1 if clear else 0
        draft: Draft | None = task.make(Random(stream), size, units_clear)
        for _ in range(8):
            context, question = _ids(tokenizer, draft)
            over = len(context) + len(question) - room
            if over <= 0 and _clear(tokenizer, draft) >= clear:
                return draft, context, question
            if over <= 0:
                break
            draft = _drop(draft, -(-over // max(1, int(line.each))))
            if draft is None:
                break
        size -= max(1, size // 50)
    raise GossamerError(
        f"{task.name} does not fit into {room} tokens; give a longer length"
        + (" or a smaller clear" if clear else "")
    )


def _clear(tokenizer: Any, draft: Draft) -> int:
    """Tokens behind the last evidence."""
    tail = " ".join(draft.units[max(draft.evidence) + 1 :])
    return len(_encode(tokenizer, " " + tail, False)) if tail else 0


def samples(
    task: str | Task,
    tokenizer: Any,
    *,
    length: int,
    count: int,
    seed: int = 0,
    clear: int = 0,
    reserve: int = 0,
) -> list[Sample]:
    """Prompts of a task, each as close below a length as whole lines allow.

    The same arguments give the same prompts, whatever was made before.

    Parameters
    ----------
    task : of :data:`TASKS`, or ``variable_tracking:1x4``, or a task of your own.
    tokenizer : of the model, as transformers gives it.
    length : tokens of prompt and answer together, at most.
    count : how many. seed : of the draws.
    clear : tokens before the question that hold no evidence; counting tasks have none to spare.
    reserve : tokens left free besides the answer's.

    Raises
    ------
    GossamerError
        If the task does not fit the length, or there is no such task.
    """
    made = find_task(task) if isinstance(task, str) else task
    for name, value, least in (
        ("length", length, 16),
        ("count", count, 1),
        ("seed", seed, 0),
        ("clear", clear, 0),
        ("reserve", reserve, 0),
    ):
        check_count(name, value, least)
    return [_sample(made, tokenizer, length - reserve, i, seed, clear) for i in range(count)]


def _sample(task: Task, tokenizer: Any, length: int, index: int, seed: int, clear: int) -> Sample:
    stream = f"{task.name}/{seed}/{index}/{length}"
    probe = task.make(Random(stream), task.least, 0)
    # Answers of one task have about the same tokens; what is left over is a handful.
    room = length - len(_encode(tokenizer, " " + probe.answer, False)) - 4
    if room < 1:
        raise GossamerError(f"{task.name} does not fit into {length} tokens; give a longer length")
    size = _size(tokenizer, task, room)
    draft, context, question = _fitted(tokenizer, task, room, stream, size, clear)
    whole = len(draft.evidence) == len(draft.units)
    return Sample(
        task=task.name,
        seed=seed,
        index=index,
        context=" ".join(draft.units),
        question=draft.question,
        answer=draft.answer,
        answers=draft.answers,
        ids=(*context, *question),
        split=len(context),
        answer_ids=tuple(_encode(tokenizer, " " + draft.answer, False)),
        depths=()
        if whole
        else tuple(round(i / max(1, len(draft.units) - 1), 4) for i in sorted(draft.evidence)),
        clear=_clear(tokenizer, draft),
    )


def suite(
    tokenizer: Any,
    *,
    length: int,
    count: int,
    tasks: tuple[str, ...] = tuple(TASKS),
    seed: int = 0,
    clear: int = 0,
) -> dict[str, list[Sample]]:
    """Prompts of several tasks, by name; see :func:`samples`."""
    if not tasks:
        raise GossamerError(f"no task is named; known: {', '.join(TASKS)}")
    return {
        name: samples(
            name,
            tokenizer,
            length=length,
            count=count,
            seed=seed,
            clear=0 if find_task(name).scope == "high" else clear,
        )
        for name in tasks
    }
