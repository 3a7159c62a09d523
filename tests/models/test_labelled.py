import json

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.models import Tokens
from gossamer.models.labelled import Labelled, as_labelled
from tests.models.tiny import tiny_model, tiny_tokenizer


def two():
    ids = torch.arange(12).view(4, 3)
    return Labelled(
        Tokens.from_ids(ids), {"label": torch.tensor([0, 1, 1, 0])}, {"label": ("calm", "angry")}
    )


def test_windows_of_a_value():
    data = two()
    assert data.where("label", "angry").input_ids.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert data.number("label", "calm") == 0
    assert len(data) == 4


def test_numbers_name_themselves():
    data = Labelled.from_ids(torch.zeros(3, 2, dtype=torch.int64), mood=torch.tensor([0, 2, 1]))
    assert data.values["mood"] == ("0", "1", "2")


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda d: d.codes("labell"), "did you mean label"),
        (lambda d: d.number("label", "angri"), "did you mean angry"),
    ],
)
def test_unknown_names_offer_the_nearest(ask, told):
    with pytest.raises(GossamerError, match=told):
        ask(two())


def test_attributes_must_fit():
    tokens = Tokens.from_ids(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(GossamerError, match="each of the 3 windows"):
        Labelled(tokens, {"label": torch.tensor([0, 1])}, {})
    with pytest.raises(GossamerError, match="outside its values"):
        Labelled(tokens, {"label": torch.tensor([0, 1, 2])}, {"label": ("a", "b")})
    with pytest.raises(GossamerError, match="no attribute"):
        Labelled(tokens, {}, {})
    with pytest.raises(GossamerError, match="no window has"):
        Labelled(tokens, {"x": torch.zeros(3, dtype=torch.int64)}, {"x": ("a", "b")}).number(
            "x", "b"
        )


def test_a_file_of_texts_and_labels(tmp_path):
    rows = [
        {"text": "ab", "label": "x", "group": 7},
        {"text": "abc", "label": "y", "group": 7},
        {"text": "b", "label": "x", "group": 8},
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    data = as_labelled(str(path), tiny_model("llama"), tokenizer=tiny_tokenizer())
    assert data.codes("label").tolist() == [0, 1, 0]
    assert data.values == {"label": ("x", "y"), "group": ("7", "8")}
    assert data.tokens.attention_mask.sum(1).tolist() == [2, 3, 1]


def test_a_mapping_of_ids():
    parts = {"a": torch.ones(2, 4, dtype=torch.int64), "b": torch.zeros(1, 4, dtype=torch.int64)}
    data = as_labelled(parts, tiny_model("llama"))
    assert data.codes("label").tolist() == [0, 0, 1]
    assert data.where("label", "b").input_ids.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "holds no text"),
        ("{", "line 1 is not JSON"),
        ('{"label": "x"}', 'no string "text"'),
        ('{"text": "a", "label": "x"}\n{"text": "b"}', "1 of 2 texts have no 'label'"),
    ],
)
def test_damaged_files_are_refused(tmp_path, lines, told):
    path = tmp_path / "texts.jsonl"
    path.write_text(lines)
    with pytest.raises(GossamerError, match=told):
        as_labelled(path, tiny_model("llama"), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("data", [None, 3.5, torch.zeros(2, 3, dtype=torch.int64), "no such.txt"])
def test_other_data_is_refused(data):
    with pytest.raises(GossamerError, match="label"):
        as_labelled(data, tiny_model("llama"))


def test_words_unknown_to_the_model_are_refused():
    with pytest.raises(GossamerError, match="vocabulary"):
        as_labelled({"a": torch.full((1, 2), 999)}, tiny_model("llama"))
