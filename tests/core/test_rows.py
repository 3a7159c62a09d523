import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core import GossamerError, SparseRows


def dense(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    return values * (torch.rand(rows, columns, generator=generator) < 0.4)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 50))
def test_forms_hold_the_same_matrix(rows: int, columns: int, seed: int):
    matrix = dense(rows, columns, seed)
    csr = SparseRows.from_dense(matrix)
    padded = csr.to_padded()
    for form in (csr, padded, padded.to_csr()):
        assert torch.equal(form.to_dense(), matrix)
        assert form.stored == int((matrix != 0).sum())
    assert csr.to_csr() is csr
    assert padded.to_padded() is padded
    right = torch.randn(columns, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(padded.matmul(right), matrix @ right)


def test_topk_takes_the_largest_ties_to_the_lower_column():
    rows = SparseRows.from_topk(torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert rows.indices.tolist() == [[1, 2], [0, 1]]
    assert rows.values.tolist() == [[3.0, 3.0], [0.0, 0.0]]
    assert "2x4, 2.0 entries a row, padded" in repr(rows)
    with pytest.raises(GossamerError, match="keep is 5"):
        SparseRows.from_topk(torch.zeros(2, 4), 5)


def test_gradients_reach_the_values():
    source = torch.tensor([[1.0, 5.0, 2.0]], requires_grad=True)
    SparseRows.from_topk(source, 2).to_dense().sum().backward()
    assert source.grad is not None
    assert source.grad.tolist() == [[0.0, 1.0, 1.0]]
    values = torch.tensor([2.0, 3.0], requires_grad=True)
    rows = SparseRows(values, torch.tensor([0, 2]), (2, 3), torch.tensor([0, 1, 2]))
    rows.to_padded().matmul(torch.ones(3, 1)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "indices", "indptr"),
    [
        ([1.0], [0, 1], [0, 1, 1]),
        ([1.0], [0], [0, 1]),
        ([1.0], [0], [0, 0, 2]),
        ([1.0], [0], [0, 2, 1]),
        ([1.0], [3], [0, 0, 1]),
        ([1.0], [-2], [0, 0, 1]),
        ([1.0], [0], None),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    values: list[float], indices: list[int], indptr: list[int] | None
):
    with pytest.raises(GossamerError):
        SparseRows(
            torch.tensor(values),
            torch.tensor(indices),
            (2, 3),
            None if indptr is None else torch.tensor(indptr),
        )
