"""Pairs of inputs and labels: what a classifier can be trained on, and what is refused."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.models.pairs import labelled_pair


def test_a_pair_comes_back_with_whole_labels_and_modes_as_they_were():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    model[1].eval()
    x, y = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0], dtype=torch.int32)
    inputs, labels = labelled_pair([x, y], model, "a method")
    assert torch.equal(inputs, x)
    assert labels.dtype == torch.int64
    assert labels.tolist() == y.tolist()
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (3, "a method takes a pair of tensors, inputs and labels; got int"),
        ((torch.ones(2, 4), [0, 1]), "takes a pair of tensors"),
        ((torch.ones(2, 4), torch.zeros(3).long()), r"got \(2, 4\) and torch.int64 \(3,\)"),
        ((torch.ones(2, 4), torch.zeros(2)), "torch.float32"),
        ((torch.ones(0, 4), torch.zeros(0).long()), r"\(0, 4\)"),
        ((torch.full((2, 4), torch.inf), torch.zeros(2).long()), "NaN or infinity"),
        ((torch.ones(2, 4), torch.tensor([0, 3])), "go from 0 to 3; the model has 3 classes"),
        ((torch.ones(2, 4), torch.tensor([-1, 2])), "go from -1 to 2"),
    ],
)
def test_what_is_refused(data, text):
    with pytest.raises(GossamerError, match=text):
        labelled_pair(data, nn.Linear(4, 3), "a method")
