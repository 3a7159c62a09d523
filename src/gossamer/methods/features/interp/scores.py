"""Scores of an explanation: does it foretell where a latent fires?

Detection and fuzzing ask a judge yes or no; embedding and surprisal compare texts. 1 is perfect,
0.5 is guessing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.interp.judges import Embedder, Judge
from gossamer.methods.features.interp.prompts import (
    DETECT,
    FUZZ,
    explain_prompt,
    read_answer,
    test_prompt,
)
from gossamer.methods.features.interp.windows import Sample, Window
from gossamer.methods.features.probing.folds import auc

__all__ = [
    "SCORERS",
    "Score",
    "detection",
    "embedding",
    "explain",
    "fuzzing",
    "questions",
    "surprisal",
]

SCORERS = ("detection", "fuzzing", "embedding", "surprisal")
_KINDS = {"detection": DETECT, "fuzzing": FUZZ}
_ANSWER = 64
_PLAIN = "The following texts have nothing in common.\n"


@dataclass(frozen=True)
class Score:
    """How well an explanation did by one measure.

    Parameters
    ----------
    name : the measure. value : balanced accuracy of detection and fuzzing, else area under the ROC
        curve. asked, answered : texts, and those that got a readable answer.
    """

    name: str
    value: float
    asked: int
    answered: int


def explain(judge: Judge, samples: Sequence[Sample], *, max_tokens: int = 64) -> list[str]:
    """What a judge says each latent fires at."""
    prompts = [explain_prompt([w.text(w.active) for w in sample.shown]) for sample in samples]
    return [" ".join(text.split()) for text in judge.complete(prompts, max_tokens=max_tokens)]


def questions(
    name: str, explanation: str, sample: Sample, *, per_prompt: int = 5, seed: int = 0
) -> tuple[list[str], list[list[bool]]]:
    """Prompts of detection or fuzzing, and the right answers.

    Texts are in random order, so that how many of a prompt are right tells nothing. Of fuzzing,
    half of the windows that fire are marked truly and half at as many tokens that do not fire.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "detection":
        items = [(w.text(), True) for w in sample.active]
        items += [(w.text(), False) for w in sample.silent]
    else:
        items = _fuzzed(sample.active, generator)
    order = torch.randperm(len(items), generator=generator).tolist()
    groups = [order[i : i + per_prompt] for i in range(0, len(order), per_prompt)]
    prompts = [test_prompt(_KINDS[name], explanation, [items[i][0] for i in g]) for g in groups]
    return prompts, [[items[i][1] for i in g] for g in groups]


def _fuzzed(active: Sequence[Window], generator: torch.Generator) -> list[tuple[str, bool]]:
    count = math.ceil(sum(len(w.active) for w in active) / max(1, len(active)))
    items: list[tuple[str, bool]] = []
    for i, window in enumerate(active):
        if i % 2 == 0:
            items.append((window.text(window.active), True))
            continue
        quiet = [j for j in range(len(window.words)) if j not in window.active]
        quiet = [j for j in quiet if window.words[j].strip()]
        if quiet:
            order = torch.randperm(len(quiet), generator=generator).tolist()
            items.append((window.text([quiet[j] for j in order[:count]]), False))
    return items


def _asked(
    name: str, judge: Judge, explanation: str, sample: Sample, per_prompt: int, seed: int
) -> Score:
    prompts, truths = questions(name, explanation, sample, per_prompt=per_prompt, seed=seed)
    right = {True: 0, False: 0}
    seen = {True: 0, False: 0}
    for answer, truth in zip(judge.complete(prompts, max_tokens=_ANSWER), truths, strict=True):
        marks = read_answer(answer, len(truth))
        for mark, true in zip(marks or (), truth, strict=marks is not None):
            seen[true] += 1
            right[true] += mark == true
    asked = sum(len(truth) for truth in truths)
    if len({true for truth in truths for true in truth}) < 2:
        # A latent that fires at every token leaves nothing to tell it from.
        return Score(name, 0.5, asked, seen[True] + seen[False])
    if not seen[True] or not seen[False]:
        raise GossamerError(
            f"of {asked} texts of latent {sample.latent} the judge answered "
            f"{seen[True] + seen[False]} in the form asked for; use another judge or more text"
        )
    value = (right[True] / seen[True] + right[False] / seen[False]) / 2
    return Score(name, value, asked, seen[True] + seen[False])


def detection(
    judge: Judge, explanation: str, sample: Sample, *, per_prompt: int = 5, seed: int = 0
) -> Score:
    """Can the judge tell by the explanation which windows the latent fires in?

    Raises
    ------
    GossamerError
        If no answer can be read.
    """
    return _asked("detection", judge, explanation, sample, per_prompt, seed)


def fuzzing(
    judge: Judge, explanation: str, sample: Sample, *, per_prompt: int = 5, seed: int = 0
) -> Score:
    """Can the judge tell by the explanation whether the right tokens are marked?

    Raises
    ------
    GossamerError
        If no answer can be read.
    """
    return _asked("fuzzing", judge, explanation, sample, per_prompt, seed)


def _texts(sample: Sample) -> tuple[list[str], Tensor]:
    texts = [w.text() for w in (*sample.active, *sample.silent)]
    return texts, torch.arange(len(texts)) < len(sample.active)


def embedding(embedder: Embedder, explanation: str, sample: Sample) -> Score:
    """Are windows that fire more like the explanation than silent ones?"""
    texts, fires = _texts(sample)
    rows = embedder.embed(texts).double()
    query = embedder.embed([explanation], query=True).double()[:, : rows.shape[1]]
    query = nn.functional.pad(query, (0, rows.shape[1] - query.shape[1]))
    cosine = nn.functional.cosine_similarity(rows, query, dim=1)
    return Score("embedding", auc(cosine.cpu(), fires), len(texts), len(texts))


def surprisal(judge: Judge, explanation: str, sample: Sample) -> Score:
    """Does the explanation make windows that fire less surprising, more than silent ones?"""
    texts, fires = _texts(sample)
    told = [f"The following texts have in common: {explanation}\n"] * len(texts)
    before, after = judge.loss([_PLAIN] * len(texts), texts), judge.loss(told, texts)
    fall = torch.tensor(before, dtype=torch.float64) - torch.tensor(after, dtype=torch.float64)
    return Score("surprisal", auc(fall, fires), len(texts), len(texts))
