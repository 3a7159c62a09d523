"""Prompts fill the length they were asked for, for any tokenizer."""

import pytest

from gossamer.core import GossamerError
from gossamer.evaluate.long_context import TASKS, samples, suite
from gossamer.evaluate.long_context import fit as fitting
from gossamer.models.loading import load_model


@pytest.mark.parametrize("length", [520, 1100])
@pytest.mark.parametrize("task", list(TASKS))
def test_prompts_fit_closely(tokenizer, task, length):
    for sample in samples(task, tokenizer, length=length, count=3):
        total = sample.length + len(sample.answer_ids)
        # Counting tasks grow by whole rounds of their words.
        assert length * (0.75 if task == "common_words" else 0.95) <= total <= length
        assert tokenizer.unk_token_id not in sample.ids
        decoded = tokenizer.decode(sample.ids, skip_special_tokens=True)
        assert decoded == sample.prompt
        assert tokenizer.decode(sample.ids[sample.split :]).strip() == sample.question


def test_another_tokenizer_gets_its_own_fit(tokenizer):
    other = load_model("nano").tokenizer
    mine = samples("niah_single", tokenizer, length=900, count=2)
    theirs = samples("niah_single", other, length=900, count=2)
    for ours in (*mine, *theirs):
        assert 850 <= ours.length + len(ours.answer_ids) <= 900
    # A byte-level tokenizer needs more tokens a sentence, so fewer sentences fit.
    assert len(theirs[0].context) < len(mine[0].context)


def test_the_estimate_is_made_once(tokenizer, monkeypatch):
    samples("niah_single", tokenizer, length=300, count=1)
    encoded = []
    real = fitting._encode
    monkeypatch.setattr(fitting, "_encode", lambda *a: encoded.append(1) or real(*a))
    samples("niah_single", tokenizer, length=900, count=4)
    # The answer's room, context, question, answer and tail of each: no search by encoding.
    assert len(encoded) <= 4 * 8


def test_deterministic_and_independent_of_order(tokenizer):
    first = samples("variable_tracking", tokenizer, length=700, count=3, seed=4)
    again = samples("variable_tracking", tokenizer, length=700, count=2, seed=4)
    assert first[:2] == again
    assert samples("variable_tracking", tokenizer, length=700, count=1, seed=5)[0] != first[0]


def test_evidence_outside_the_observation_window(tokenizer):
    for task in ("niah_single", "niah_multikey", "niah_multivalue", "variable_tracking"):
        for sample in samples(task, tokenizer, length=900, count=3, clear=128):
            assert sample.clear >= 128
            assert max(sample.depths) < 1.0
            tail = tokenizer.decode(sample.ids[sample.split - 128 : sample.split])
            assert not any(answer in tail for answer in sample.answers)


def test_a_suite_has_every_task(tokenizer):
    made = suite(tokenizer, length=600, count=1, clear=64)
    assert tuple(made) == tuple(TASKS)
    assert made["niah_single"][0].clear >= 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 100, "task": "variable_tracking"}, "longer length"),
        ({"length": 8}, "length is 8"),
        ({"count": 0}, "count is 0"),
        ({"task": "niah"}, "unknown task"),
        ({"length": 200, "clear": 190}, "longer length"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(tokenizer, values, message):
    given = {"task": "niah_single", "length": 600, "count": 1, **values}
    task = given.pop("task")
    with pytest.raises(GossamerError, match=message):
        samples(task, tokenizer, **given)
    with pytest.raises(GossamerError, match="no task"):
        suite(tokenizer, length=600, count=1, tasks=())
