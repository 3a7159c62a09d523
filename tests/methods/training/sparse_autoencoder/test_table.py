"""Tables: what is one, what is not, and standardised features."""

import numpy as np
import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.training.sparse_autoencoder.table import as_table, standardise, varying


@pytest.mark.parametrize(
    "data",
    [
        torch.arange(6).view(3, 2),
        np.arange(6).reshape(3, 2).astype(np.uint8),
        [[0, 1], [2, 3], [4, 5]],
        np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(3, 2)),
    ],
)
def test_numbers_become_float32(data):
    found = as_table(data)
    assert found.dtype == torch.float32
    assert found.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_float64_stays():
    assert as_table(np.ones((2, 3))).dtype == torch.float64
    assert as_table(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (3.5, "shape"),
        (None, "NoneType"),
        ([["a", "b"], ["c", "d"]], "array of numbers"),
        ([[1, 2], [3]], "array of numbers"),
        (torch.ones(1, 4), "at least 2 samples"),
        (torch.ones(4), "shape"),
        (torch.ones(4, 0), "shape"),
        (np.array([[1.0, np.inf], [2.0, np.nan]]), "1 features hold NaN"),
    ],
)
def test_other_data_are_refused(data, says):
    with pytest.raises(GossamerError, match=says):
        as_table(data)


def test_another_number_of_features_is_refused():
    with pytest.raises(GossamerError, match="has 4 features; 5 are expected"):
        as_table(torch.ones(3, 4), 5)


def test_standardised():
    table = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 7 + 100
    found = standardise(table)
    assert torch.allclose(found.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(found.square().mean(0), torch.ones(4), atol=1e-5)
    kept = table.clone()
    standardise(table)
    assert torch.equal(table, kept)


def test_constant_features():
    table = torch.tensor([[1.0, 5.0, 0.1], [1.0, 6.0, 0.1], [1.0, 5.0, 0.1]])
    assert varying(table).tolist() == [False, True, False]
