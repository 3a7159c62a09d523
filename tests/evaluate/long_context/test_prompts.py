"""One's own prompts: read as they are written, and continued as they would be decoded."""

import json

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.evaluate.long_context import samples
from gossamer.evaluate.long_context.prompts import continued, read_prompts


def test_jsonl_is_read_with_one_or_several_answers(tokenizer, tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [
        {"prompt": "The number of kalo is", "answer": "0000001"},
        {"prompt": "which words are", "answer": ["river", "stork"]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    kind, (first, second) = read_prompts(path, tokenizer, length=64)
    assert kind == "answers"
    assert first.ids == tuple(tokenizer("The number of kalo is")["input_ids"])
    assert tokenizer.decode(first.answer_ids).strip() == "0000001"
    assert second.answers == ("river", "stork")
    assert len(read_prompts(path, tokenizer, length=64, count=1)[1]) == 1


def test_text_is_cut_into_windows_with_a_continuation(tokenizer, tmp_path):
    path = tmp_path / "own.txt"
    context = samples("niah_single", tokenizer, length=300, count=1)[0].context
    path.write_text(context, encoding="utf-8")
    kind, windows = read_prompts(path, tokenizer, length=64)
    assert kind == "text"
    stream = [i for w in windows for i in (*w.ids, *w.answer_ids)]
    assert stream == tokenizer(context)["input_ids"][: len(stream)]
    assert all(len(w.ids) == 48 and len(w.answer_ids) == 16 for w in windows)
    with pytest.raises(GossamerError, match="fills no prompt"):
        read_prompts(path, tokenizer, length=4096)


def test_decoding_and_reading_at_once_give_one_loss(model, tokenizer, tmp_path):
    path = tmp_path / "own.txt"
    prompts = samples("niah_multikey", tokenizer, length=300, count=1)
    path.write_text(prompts[0].context, encoding="utf-8")
    _, windows = read_prompts(path, tokenizer, length=64)
    stepped = continued(model, windows, batch_size=2)
    whole = continued(model, windows, batch_size=3, stepwise=False)
    assert stepped.exact == pytest.approx(whole.exact, abs=1e-5)
    ids = torch.tensor([[*windows[0].ids, *windows[0].answer_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, 47:-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 48:])
    assert stepped.exact[0] == pytest.approx(-float(loss), abs=1e-5)
