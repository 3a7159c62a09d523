"""Training batches made on ids say the same as their text, and every answer is right."""

import re
from collections import Counter

import pytest
import torch

from gossamer.models.recall.batches import SHARES, Batches
from gossamer.models.recall.tokenizer import build

TOKENIZER = build()


def asked(batch):
    """Text, and (question, answer) pairs, of every row."""
    for ids, answers in zip(batch.ids, batch.answers, strict=True):
        text = TOKENIZER.decode(ids.tolist())
        said = [part.strip() for part in TOKENIZER.decode(ids[answers].tolist()).split(".")]
        questions = re.findall(r"Question: ([^?]+)\? Answer: ([^.]+)\.", text)
        assert [answer for _, answer in questions] == [part for part in said if part]
        assert questions
        yield text.partition("Question:")[0], questions


@pytest.fixture(scope="module")
def batches():
    return Batches(torch.device("cpu"), seed=3)


@pytest.mark.parametrize("length", [128, 640])
@pytest.mark.parametrize("kind", ["one", "several", "all"])
def test_needles(batches, kind, length):
    for _ in range(4):
        for context, questions in asked(batches.task(kind, 3, length)):
            told = re.findall(r"The number of (\w+) is (\d{7})\.", context)
            for question, answer in questions:
                names = question.partition(" of ")[2].split(", ")
                values = [value for one in names for name, value in told if name == one]
                assert re.findall(r"\d{7}", answer) == values
                assert len(values) == (len(names) if kind != "all" else len(values)) >= 1


@pytest.mark.parametrize("length", [128, 640])
def test_traces(batches, length):
    for _ in range(4):
        for context, questions in asked(batches.task("trace", 3, length)):
            follows = {b: a for a, b in re.findall(r"VAR (\w+) = VAR (\w+)\.", context)}
            first = {v: a for a, v in re.findall(r"VAR (\w+) = (\d{7})\.", context)}
            for question, answer in questions:
                chain = [first[question.split()[-1]]]
                while chain[-1] in follows:
                    chain.append(follows[chain[-1]])
                assert answer.split(", ") == chain


@pytest.mark.parametrize("length", [128, 640])
def test_counts(batches, length):
    for context, questions in asked(batches.task("common", 3, length)):
        ranked = Counter(context.split()).most_common()
        assert set(questions[0][1].split(", ")) == {word for word, _ in ranked[:10]}
        assert ranked[9][1] > ranked[10][1]
    for context, questions in asked(batches.task("frequent", 3, length)):
        counts = Counter(context.split())
        said = [counts[word] for word in questions[0][1].split(", ")]
        assert said == sorted(counts.values(), reverse=True)[:3]


def test_batches_hold_every_task_and_are_drawn_from_the_seed():
    first, again, other = (Batches(torch.device("cpu"), seed).draw(46, 256) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    assert set(first.task) == set(SHARES)
    assert first.ids.shape == (46, 256)
    assert bool(first.answers.any(1).all())
    # Padding stands behind everything else.
    real = first.ids != 0
    assert bool((real[:, :-1] >= real[:, 1:]).all())
