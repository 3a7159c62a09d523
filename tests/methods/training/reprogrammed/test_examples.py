"""Labelled samples, whatever form they have."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.reprogrammed.examples import as_examples, few_shot, is_text
from gossamer.models import Inputs, Tokens
from gossamer.models.labelled import Labelled
from tests.models.tiny import tiny_model
from tests.models.vision import mobilenet

X, Y = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def test_forms():
    net = nn.Linear(2, 2)
    assert list(as_examples((X, Y), net).values) == ["x"]
    assert list(as_examples((X, Y), mobilenet()).values) == ["pixel_values"]
    found = as_examples(Inputs({"pixel_values": X, "labels": Y}), mobilenet())
    assert (list(found.values), found.names) == (["pixel_values"], ("0", "1", "2"))
    llama = tiny_model("llama")
    ids = torch.randint(3, 128, (6, 5))
    assert is_text(llama)
    assert not is_text(mobilenet())
    assert not is_text(tiny_model("bert"))
    text = as_examples(Labelled.from_ids(ids, label=Y), llama)
    assert list(text.values) == ["input_ids"]
    mask = torch.ones(6, 5).bool()
    mask[0, 4] = False
    padded = Labelled(Tokens(ids, mask), {"label": Y}, {"label": ("a", "b", "c")})
    text = as_examples(padded, llama)
    assert list(text.values) == ["input_ids", "attention_mask"]
    assert text.names == ("a", "b", "c")


def test_shots_are_drawn_of_every_class():
    examples = as_examples((torch.arange(90.0)[:, None], torch.arange(90) % 3), nn.Linear(1, 3))
    few = few_shot(examples, 4, seed=0)
    assert torch.bincount(few.labels).tolist() == [4, 4, 4]
    assert torch.equal(few.values["x"][:, 0].long() % 3, few.labels)
    assert not torch.equal(few.values["x"], few_shot(examples, 4, seed=1).values["x"])
    assert few_shot(examples, None, 0) is examples
    assert len(few_shot(examples, 1000, 0)) == 90


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (3.5, "needs labelled samples and got float"),
        ((X, Y.float()), "labels are whole numbers"),
        ((X, Y[:3]), "labels are whole numbers"),
        ((X[:0], Y[:0]), "labels are whole numbers"),
        ((X, Y - 1), "class -1 is below 0"),
        ((X, Y * 2), "class 1 has no sample"),
        ((X / 0, Y), "x holds NaN or infinity"),
        (Inputs({"pixel_values": X}), "have no labels"),
    ],
)
def test_what_cannot_be_used(data, what):
    with pytest.raises(GossamerError, match=what):
        as_examples(data, nn.Linear(2, 2))
