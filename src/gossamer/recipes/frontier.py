"""The frontier: how sparse attention may become before some task is answered worse.

Every method climbs a ladder of sparsities on the same prompts as the dense model. At each rung all
methods and tasks still in the race are judged together (paired bootstrap, Holm); a method goes on
only while every task passes, so no correction over the rungs is needed: testing in a fixed order
stops at the first failure. Tasks that the dense model itself cannot do are named and left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from gossamer import methods
from gossamer.core import GossamerError, check_sparsity
from gossamer.evaluate.long_context import TASKS, Row, Sample, find_task, generate
from gossamer.evaluate.long_context.prompts import Kind, continued
from gossamer.evaluate.long_context.scoring import Answers, Question
from gossamer.evaluate.verdict import TaskVerdict, judge
from gossamer.methods.attention.applied import SparseAttention
from gossamer.methods.attention.base import AttentionMethod
from gossamer.models import Progress, Tokens

__all__ = [
    "CONTROLS",
    "LADDER",
    "Cell",
    "Frontier",
    "able",
    "at_amount",
    "candidates",
    "climb",
    "measure",
    "number",
]

LADDER = (0.5, 0.75, 0.9, 0.95)
CONTROLS = ("oracle_top_k", "random_keys")
"""Ceiling and floor: what knows the answer, and what knows nothing."""
ABLE = 0.9
"""Share of exact answers below which the dense model cannot do a task."""

_SHARES = {"gamma": 1.0, "coverage": 0.02}
"""Fields that set an amount where a method has no sparsity, and what one unit of loss of it is."""


def candidates() -> tuple[str, ...]:
    """Keys of the methods that make a trained decoder's attention sparse without training it."""
    found: list[str] = []
    for key in methods.keys("attention"):
        cls = methods.get(key)
        if not (isinstance(cls, type) and issubclass(cls, AttentionMethod)):
            continue
        names = {f.name for f in fields(cls)}
        if names & {"sparsity", *_SHARES} and "steps" not in names and key not in CONTROLS:
            found.append(key)
    return tuple(found)


def number(word: str) -> float:
    """A sparsity from text."""
    return check_sparsity(word.strip())  # type: ignore[arg-type]


def at_amount(text: str, sparsity: float, length: int) -> AttentionMethod:
    """A method in text form, made as sparse as asked and sized for a context.

    A method without a sparsity gets its share of mass instead: ``gamma = 1 - sparsity / 5``, or a
    twentieth of the sparsity as coverage; what it then keeps is measured. Blocks and windows that
    were chosen for long contexts shrink to a 32nd and a 16th of a short one, unless given.

    Raises
    ------
    GossamerError
        If the method is none of the family, or has no amount to set.
    """
    check_sparsity(sparsity)
    parts = methods.split_text(text)
    cls, given = methods.get(parts[0]), methods.text_fields(parts[1:])
    if not (isinstance(cls, type) and issubclass(cls, AttentionMethod)):
        raise GossamerError(
            f"{parts[0]} does not make attention sparse; choose from {', '.join(candidates())}"
        )
    names = {f.name for f in fields(cls) if f.init}
    values: dict[str, Any] = {**given}
    if "sparsity" in names:
        values.setdefault("sparsity", sparsity)
    elif "gamma" in names:
        values.setdefault("gamma", round(1.0 - sparsity / 5, 4))
    elif "coverage" in names:
        values.setdefault("coverage", sparsity / 20)
    else:
        raise GossamerError(f"{parts[0]} has no sparsity to climb; choose another method")
    small = {"block_size": max(16, length // 32), "window": max(16, length // 16)}
    small |= {"budget_tokens": max(16, length // 16), "min_tokens": length // 8}
    for name, most in small.items():
        default = next((f.default for f in fields(cls) if f.name == name), None)
        if isinstance(default, int) and default > most and name not in values:
            values[name] = most
    made = methods.make(parts[0], **values)
    assert isinstance(made, AttentionMethod)
    return replace(made, length=length)


@dataclass(frozen=True)
class Cell:
    """One method at one amount: its answers and rows by task.

    Parameters
    ----------
    name : the method in the words it was asked for, or ``dense``. sparsity : the rung.
    scores : task -> exact answers, a number for each prompt. rows : task -> row.
    """

    name: str
    sparsity: float
    scores: Mapping[str, tuple[float, ...]]
    rows: Mapping[str, Row]

    @property
    def density(self) -> float | None:
        """Mean measured density over the tasks; None where it was not measured."""
        found = [row.density for row in self.rows.values() if row.density is not None]
        return sum(found) / len(found) if found else None


def _tokens(samples: Sequence[Sample], answer: bool = False) -> Tokens:
    rows = [[*s.ids, *(s.answer_ids if answer else ())] for s in samples]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    return Tokens(ids, mask)


def measure(
    loaded: Any,
    suite: Mapping[str, Sequence[Sample]],
    method: AttentionMethod | None,
    *,
    name: str = "dense",
    sparsity: float = 0.0,
    batch_size: int = 8,
    question: Question = "seen",
    dense: Cell | None = None,
    timed: bool = True,
    kind: Kind = "answers",
    progress: Progress | None = None,
) -> Cell:
    """Answer every task with a method at work, or densely without one.

    Parameters
    ----------
    loaded : model and tokenizer. suite : task -> prompts.
    name, sparsity : what the cell is called. dense : the dense cell, for its times.
    timed : measure one attention call's choosing and reading too, where the method can.
    kind : ``text`` scores the loss of the prompts' continuations instead of generated answers.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    scores: dict[str, tuple[float, ...]] = {}
    rows: dict[str, Row] = {}
    work: SparseAttention | None = None
    try:
        if method is not None:
            longest = [max(s, key=lambda x: x.length) for s in suite.values()]
            work = method.apply(model, _tokens(longest))
        for task, prompts in suite.items():
            if kind == "text":
                found = continued(model, prompts, batch_size=batch_size)
            else:
                found = generate(
                    model,
                    tokenizer,
                    prompts,
                    batch_size=batch_size,
                    question=question,
                    progress=progress,
                )
            scores[task] = found.exact
            before = None if dense is None else dense.rows[task].seconds
            rows[task] = _row(name, task, prompts, found, work, batch_size, question, before)
    finally:
        if work is not None:
            work.restore()
    if timed and method is not None:
        times = _times(model, suite, method)
        rows = {task: replace(row, **times) for task, row in rows.items()}
    return Cell(name, sparsity, scores, rows)


def _row(
    name: str,
    task: str,
    prompts: Sequence[Sample],
    found: Answers,
    work: SparseAttention | None,
    batch_size: int,
    question: str,
    dense_seconds: float | None,
) -> Row:
    density: float | None = 1.0 if work is None else None
    rho = density
    if work is not None:
        kept = work.measure(_tokens(prompts[:1], answer=True), len(prompts[0].answer_ids))
        total = sum(row.total for row in kept)
        if total:
            density = sum(row.kept for row in kept) / total
            rho = sum(row.mass * row.total for row in kept) / total
    known = find_task(task) if task.partition(":")[0] in TASKS else None
    return Row(
        method=name,
        task=task,
        phase="all" if work is None else "+".join(sorted(work.method.phases, reverse=True)),
        density=density,
        rho=rho,
        batch=min(batch_size, len(prompts)),
        length=max(s.length for s in prompts),
        score=found.score,
        part=sum(found.part) / len(found.part),
        samples=len(prompts),
        question=question,
        scope="" if known is None else known.scope,
        dispersion="" if known is None else known.dispersion,
        seconds=found.seconds / len(prompts),
        dense_seconds=dense_seconds,
        baseline="the model's own attention (torch SDPA)",
        executors="" if work is None else " ".join(f"{k}:{v}" for k, v in sorted(work.ran.items())),
    )


def _times(
    model: nn.Module, suite: Mapping[str, Sequence[Sample]], method: AttentionMethod
) -> dict[str, float]:
    """Seconds of one layer's call in the method's costliest phase: choosing, and reading."""
    from gossamer.methods.attention.measure import walk

    try:
        timed = replace(method, backend="fastest", min_length=0)
        sample = max((s for group in suite.values() for s in group), key=lambda s: s.length)
        tokens = _tokens([sample], answer=True)
        with timed.apply(model, tokens) as work, torch.no_grad():
            for _ in range(2):
                walk(model, tokens, 4 if "decode" in timed.phases else 0)
            found = list(work.breakeven.timings.values())
    except GossamerError:
        return {}
    if not found:
        return {}
    most = max(found, key=lambda t: t.dense)
    return {
        "selection_seconds": most.select,
        "attention_seconds": most.attend,
        "dense_attention_seconds": most.dense,
    }


def able(dense: Cell, least: float = ABLE) -> tuple[str, ...]:
    """Tasks the dense model can do: on the others no loss could be seen."""
    return tuple(t for t, s in dense.scores.items() if sum(s) / len(s) >= least)


@dataclass
class Frontier:
    """What was climbed, and where each method stands.

    Parameters
    ----------
    dense : the dense cell. tasks : tasks judged. unable : tasks the dense model cannot do.
    cells : (method, sparsity) -> cell. verdicts : (method, sparsity, task) -> verdict.
    passing : method -> largest sparsity that passed every task, 0 if none.
    """

    dense: Cell
    tasks: tuple[str, ...]
    unable: tuple[str, ...]
    cells: dict[tuple[str, float], Cell] = field(default_factory=dict)
    verdicts: dict[tuple[str, float, str], TaskVerdict] = field(default_factory=dict)
    passing: dict[str, float] = field(default_factory=dict)

    def passes(self, name: str, sparsity: float) -> bool:
        """Whether every judged task passed at a rung."""
        found = [self.verdicts.get((name, sparsity, task)) for task in self.tasks]
        return bool(found) and all(v is not None and v.passes for v in found)

    def saved(self, name: str) -> float:
        """Share of the pairs removed, as measured, where a method last passed; 0 if nowhere."""
        cell = self.cells.get((name, self.passing.get(name, 0.0)))
        return 0.0 if cell is None or cell.density is None else 1.0 - cell.density

    def failed(self, name: str, sparsity: float) -> tuple[str, ...]:
        """Tasks that failed at a rung."""
        return tuple(
            t for t in self.tasks if (v := self.verdicts.get((name, sparsity, t))) and not v.passes
        )


def climb(
    dense: Cell,
    cells: Iterable[Cell],
    *,
    margin: float = 0.02,
    level: float = 0.05,
    least: float = ABLE,
    draws: int = 10_000,
    seed: int = 0,
) -> Frontier:
    """Judge cells rung by rung.

    Every cell gets a verdict, also above a method's first failure; ``passing`` stops there.

    Parameters
    ----------
    margin, level, draws, seed : see :func:`gossamer.evaluate.verdict.judge`.
    least : see :func:`able`.

    Raises
    ------
    GossamerError
        If the dense model can do none of the tasks.
    """
    tasks = able(dense, least)
    if not tasks:
        best = max(sum(s) / len(s) for s in dense.scores.values())
        raise GossamerError(
            f"the dense model answers no task well enough to lose anything (best {best:.0%}, "
            f"needed {least:.0%}); give prompts it can answer, or a shorter length"
        )
    out = Frontier(dense, tasks, tuple(t for t in dense.scores if t not in tasks))
    out.cells = {(cell.name, cell.sparsity): cell for cell in cells}
    for rung in sorted({sparsity for _, sparsity in out.cells}):
        here = {name: cell for (name, s), cell in out.cells.items() if s == rung}
        scores = {"dense": {t: dense.scores[t] for t in tasks}}
        scores |= {name: {t: cell.scores[t] for t in tasks} for name, cell in here.items()}
        for verdict in judge(scores, margin=margin, level=level, draws=draws, seed=seed):
            out.verdicts[verdict.method, rung, verdict.task] = verdict
    for name in dict.fromkeys(name for name, _ in out.cells):
        out.passing[name] = 0.0
        for rung in sorted(s for n, s in out.cells if n == name):
            if not out.passes(name, rung):
                break
            out.passing[name] = rung
    return out
