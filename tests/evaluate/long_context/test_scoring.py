"""Scoring: what counts as an answer, and that batches, padding and splitting change nothing."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.evaluate.forward import Decoder
from gossamer.evaluate.long_context import expected, generate, matches, samples
from gossamer.evaluate.long_context.scoring import answered


def test_answers_match_as_whole_words_before_the_first_stop():
    assert matches(" 0000001, 0000002.", ["0000001", "0000002"]) == 1.0
    assert matches("00000012.", ["0000001"]) == 0.0
    assert matches("kalo 5. 0000001", ["0000001"]) == 0.0
    assert matches("\n 0000001", ["0000001"]) == 1.0
    assert matches("b, a", ["a", "b"]) == 1.0


@torch.no_grad()
def alone(model, ids, new):
    return Decoder(model).decode(torch.tensor([ids]), new)[0].tolist()


def test_batches_padded_on_the_left_answer_as_single_prompts(model, tokenizer):
    prompts = [samples("niah_single", tokenizer, length=n, count=1)[0] for n in (90, 140, 200)]
    found = generate(model, tokenizer, prompts, batch_size=3)
    for sample, text in zip(prompts, found.texts, strict=True):
        ids = alone(model, sample.ids, len(sample.answer_ids) + 1)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_reading_the_context_first_changes_nothing_for_a_dense_model(model, tokenizer):
    prompts = [
        *samples("niah_single", tokenizer, length=90, count=1),
        *samples("niah_multikey", tokenizer, length=150, count=2),
    ]
    seen = generate(model, tokenizer, prompts, batch_size=3)
    unseen = generate(model, tokenizer, prompts, batch_size=3, question="unseen")
    assert seen.texts == unseen.texts
    # Questions of different lengths leave padding between context and question.
    mixed = [prompts[0], *samples("niah_multiquery", tokenizer, length=200, count=1)]
    apart = generate(model, tokenizer, mixed, batch_size=2, question="unseen")
    assert apart.texts == generate(model, tokenizer, mixed, batch_size=1).texts


def test_scores_follow_the_answers(model, tokenizer, monkeypatch):
    from gossamer.evaluate.long_context import scoring

    prompts = samples("niah_multivalue", tokenizer, length=200, count=2)

    def told(model, part, new, fill, device, question):
        rows = [list(s.answer_ids) for s in part]
        rows[-1][:4] = [tokenizer.unk_token_id] * 4
        return torch.tensor([row + [0] * (new - len(row)) for row in rows])

    monkeypatch.setattr(scoring, "_answer", told)
    found = generate(model, tokenizer, prompts, batch_size=2)
    assert sorted(found.exact) == [0.0, 1.0]
    assert sorted(found.part) == [0.75, 1.0]
    assert found.score == 0.5


def test_expected_tokens_may_name_the_answers_in_any_order(tokenizer):
    (sample,) = samples("common_words", tokenizer, length=300, count=1)
    pieces = [tokenizer(" " + w, add_special_tokens=False)["input_ids"] for w in sample.answers]
    truth = list(sample.answer_ids)
    assert answered(truth, sample, pieces)
    later = list(truth)
    later[0] = pieces[5][0]
    assert answered(later, sample, pieces)
    repeated = list(truth)
    repeated[2] = pieces[0][0]
    assert not answered(repeated, sample, pieces)
    comma = list(truth)
    comma[1] = truth[0]
    assert not answered(comma, sample, pieces)


def test_expected_agrees_with_a_pass_over_each_prompt(model, tokenizer):
    prompts = [samples("niah_single", tokenizer, length=n, count=1)[0] for n in (100, 150)]
    with torch.no_grad():
        best = []
        for s in prompts:
            logits = model(torch.tensor([[*s.ids, *s.answer_ids]])).logits
            best.append(logits[0, s.length - 1 : -1].argmax(-1).tolist())
    wanted = tuple(
        float(answered(b, s, [list(s.answer_ids[:4])])) for b, s in zip(best, prompts, strict=True)
    )
    assert expected(model, tokenizer, prompts, batch_size=2) == wanted


def test_too_long_a_prompt_is_refused(model, tokenizer):
    prompts = samples("niah_single", tokenizer, length=900, count=1)
    with pytest.raises(GossamerError, match="limit is 512"):
        generate(model, tokenizer, prompts)
    with pytest.raises(GossamerError, match="no sample"):
        generate(model, tokenizer, [])
