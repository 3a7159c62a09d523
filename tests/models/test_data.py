"""Windows tile the documents exactly, and every input a user may give becomes tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RobertaConfig, RobertaModel

from gossamer.core import GossamerError
from gossamer.models import Inputs, Tokens, as_tokens, context_length
from tests.models.tiny import tiny_folder, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
OPENING = tiny_tokenizer(bos=True)
EOS = TOKENIZER.eos_token_id

documents = st.lists(st.text("abc \n", min_size=0, max_size=40), min_size=1, max_size=6)


def joined(texts: list[str]) -> list[int]:
    """The documents' tokens, each followed by end-of-text."""
    return [i for t in texts for i in [*TOKENIZER(t, add_special_tokens=False)["input_ids"], EOS]]


@given(documents, st.integers(2, 9))
def test_windows_tile_the_joined_documents(texts: list[str], length: int) -> None:
    stream = joined(texts)
    if len(stream) < length:
        with pytest.raises(GossamerError, match=rf"holds {len(stream)} tokens.*needs {length}"):
            Tokens.from_documents(texts, TOKENIZER, length=length)
        return
    tokens = Tokens.from_documents(texts, TOKENIZER, length=length)
    assert len(tokens) == len(stream) // length
    assert tokens.input_ids.flatten().tolist() == stream[: len(tokens) * length]
    assert tokens.attention_mask.all()
    assert tokens.count == tokens.input_ids.numel()


@given(documents, st.integers(2, 9), st.integers(1, 8), st.integers(0, 3))
def test_samples_are_distinct_windows_in_order(
    texts: list[str], length: int, samples: int, seed: int
) -> None:
    if len(joined(texts)) < length:
        return
    whole = Tokens.from_documents(texts, TOKENIZER, length=length).input_ids.tolist()
    drawn = Tokens.from_documents(texts, TOKENIZER, length=length, samples=samples, seed=seed)
    again = Tokens.from_documents(texts, TOKENIZER, length=length, samples=samples, seed=seed)
    assert torch.equal(drawn.input_ids, again.input_ids)
    assert len(drawn) == min(samples, len(whole))
    left = iter(whole)
    assert all(any(row == other for other in left) for row in drawn.input_ids.tolist())


def test_another_seed_draws_other_windows() -> None:
    text = ["abcdefghij" * 40]
    draws = {
        tuple(
            Tokens.from_documents(text, TOKENIZER, length=7, samples=5, seed=s)
            .input_ids.flatten()
            .tolist()
        )
        for s in range(4)
    }
    assert len(draws) == 4


@given(documents, st.integers(2, 9))
def test_a_tokenizer_that_opens_texts_opens_every_window(texts: list[str], length: int) -> None:
    stream = joined(texts)
    if len(stream) < length - 1:
        return
    ids = Tokens.from_documents(texts, OPENING, length=length).input_ids
    assert (ids[:, 0] == OPENING.bos_token_id).all()
    assert ids[:, 1:].flatten().tolist() == stream[: len(ids) * (length - 1)]


@given(st.integers(1, 7), st.integers(1, 9))
def test_batches_are_all_windows_in_order(rows: int, size: int) -> None:
    tokens = Tokens.from_ids(torch.arange(rows * 3).view(rows, 3))
    batches = list(tokens.batches(size))
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), tokens.input_ids)
    assert all(set(b) == {"input_ids"} for b in batches)
    assert [len(b["input_ids"]) for b in batches[:-1]] == [size] * (len(batches) - 1)


def test_padding_reaches_the_model_only_where_there_is_some() -> None:
    tokens = Tokens.from_texts_padded(["abcd", "ab"], TOKENIZER, side="left")
    pad, a, b = TOKENIZER.pad_token_id, *TOKENIZER("ab")["input_ids"]
    assert tokens.input_ids[1].tolist() == [pad, pad, a, b]
    assert tokens.attention_mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert tokens.count == 6
    first, second = tokens.batches(1)
    assert set(first) == {"input_ids"}
    assert second["attention_mask"].tolist() == [[0, 0, 1, 1]]
    assert second["position_ids"].tolist() == [[0, 0, 0, 1]]
    right = Tokens.from_texts_padded(["abcd", "ab"], TOKENIZER, length=3)
    assert right.attention_mask.tolist() == [[True] * 3, [True, True, False]]
    assert "position_ids" not in next(right.batches(2))
    opened = Tokens.from_texts_padded(["ab"], OPENING)
    assert opened.input_ids[0].tolist() == [OPENING.bos_token_id, a, b]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_left_padding_changes_no_logits(name: str) -> None:
    model = tiny_model(name)
    texts = ["the quick brown fox", "jumps"]
    padded = next(Tokens.from_texts_padded(texts, TOKENIZER, side="left").batches(2))
    with torch.no_grad():
        logits = model(**padded).logits[1, -5:]
        alone = model(**next(Tokens.from_texts_padded(["jumps"], TOKENIZER).batches(1))).logits[0]
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_slice() -> None:
    tokens = Tokens.from_ids(torch.arange(12).view(4, 3))
    assert tokens.slice(2).input_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tokens.slice(3, 9).input_ids.tolist() == [[9, 10, 11]]
    assert tokens.length == 3
    with pytest.raises(GossamerError, match="shape"):
        tokens.slice(4, 5)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (torch.zeros(3, dtype=torch.long), torch.ones(3), "shape"),
        (torch.zeros(2, 3), torch.ones(2, 3), "float32"),
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4), r"\(2, 4\)"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]), "padding only"),
        (torch.zeros(0, 3, dtype=torch.long), torch.ones(0, 3), "shape"),
    ],
)
def test_impossible_tokens(ids: torch.Tensor, mask: torch.Tensor, words: str) -> None:
    with pytest.raises(GossamerError, match=words):
        Tokens(ids, mask)


@pytest.mark.parametrize("options", [{"length": 1}, {"length": 8, "samples": 0}, {"length": 2.5}])
def test_impossible_windows(options: dict[str, int]) -> None:
    with pytest.raises(GossamerError, match="whole number"):
        Tokens.from_documents(["abcdefghijkl"], TOKENIZER, **options)


def test_impossible_batches_and_sides() -> None:
    tokens = Tokens.from_ids(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(GossamerError, match="batch size"):
        next(tokens.batches(0))
    with pytest.raises(GossamerError, match="side"):
        Tokens.from_texts_padded(["a"], TOKENIZER, side="up")
    with pytest.raises(GossamerError, match="no tokens"):
        Tokens.from_texts_padded(["a", ""], TOKENIZER)


def test_inputs_are_batched_together() -> None:
    inputs = Inputs({"pixel_values": torch.arange(5), "labels": torch.arange(5)})
    batches = list(inputs.batches(2))
    assert [b["labels"].tolist() for b in batches] == [[0, 1], [2, 3], [4]]
    assert len(inputs) == 5
    for bad in ({}, {"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": torch.zeros(0)}):
        with pytest.raises(GossamerError, match="number of samples"):
            Inputs(bad)


def test_as_tokens_takes_ids_mappings_and_tokens() -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, 128, (2, 6))
    assert as_tokens(Tokens.from_ids(ids), model).count == 12
    assert torch.equal(as_tokens(ids, model).input_ids, ids)
    mask = torch.ones(2, 6)
    mask[0, 4:] = 0
    assert as_tokens({"input_ids": ids, "attention_mask": mask}, model).count == 10
    encoded = TOKENIZER(["abc", "de"], padding=True, return_tensors="pt")
    assert as_tokens(encoded, model).count == 5


def test_as_tokens_refuses_what_the_model_cannot_take() -> None:
    model = tiny_model("llama")
    with pytest.raises(GossamerError, match=r"from 3 to 128.*from 0 to 127"):
        as_tokens(torch.tensor([[3, 128]]), model)
    with pytest.raises(GossamerError, match="data is a int"):
        as_tokens(3, model)
    with pytest.raises(GossamerError, match="needs tokens"):
        as_tokens(Inputs({"x": torch.zeros(1)}), model)
    with pytest.raises(GossamerError, match="tokenizer is unknown"):
        as_tokens(["some text"], model)


def test_as_tokens_reads_text_with_the_models_own_tokenizer(tmp_path) -> None:
    model = tiny_model("llama")
    model.name_or_path = str(tiny_folder(tmp_path / "model"))
    text = "def f(x):\n    return x\n" * 40
    (tmp_path / "code.py").write_text(text)
    expected = Tokens.from_documents([text], TOKENIZER, length=64, samples=3)
    for data in ([text], str(tmp_path / "code.py"), tmp_path / "code.py"):
        got = as_tokens(data, model, samples=3, length=64)
        assert torch.equal(got.input_ids, expected.input_ids)
    # The tiny models' context is 128.
    assert as_tokens([text], model).length == 128
    with pytest.raises(GossamerError, match="3 tokens, one window needs 128"):
        as_tokens(["ab"], model)


def test_context_length() -> None:
    assert context_length(tiny_model("llama")) == 128
    assert context_length(tiny_model("gpt2")) == 128
    roberta = RobertaModel(
        RobertaConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=20,
            pad_token_id=1,
        )
    )
    assert context_length(roberta) == 18
    assert context_length(torch.nn.Linear(2, 2)) is None


def test_much_text_is_sampled_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.models.data._SAMPLED_CHARACTERS", 50)
    texts = [letter * 20 for letter in "abcdefgh"]
    tokens = Tokens.from_documents(texts, TOKENIZER, length=10, samples=4, seed=1)
    again = Tokens.from_documents(texts, TOKENIZER, length=10, samples=4, seed=1)
    assert torch.equal(tokens.input_ids, again.input_ids)
    assert len(set(tokens.input_ids.flatten().tolist()) - {EOS}) <= 3
    assert len(Tokens.from_documents(texts, TOKENIZER, length=10)) == 16
