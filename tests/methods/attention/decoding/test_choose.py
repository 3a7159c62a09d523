import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.core.budget import kept_count
from gossamer.methods.attention.decoding.choose import Amount, best, index_of, visible
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.quest import Quest


@given(st.floats(0, 0.999), st.integers(1, 500))
def test_amounts_are_the_exact_counts(sparsity, seen):
    got = Amount(sparsity, None).of(torch.tensor([seen]))
    assert int(got) == max(1, kept_count(seen, sparsity))


def test_counts_and_floors():
    seen = torch.tensor([2, 10, 40])
    assert Amount(None, 8).of(seen).tolist() == [2, 8, 8]
    assert Amount(0.9, None, least=3).of(seen).tolist() == [2, 3, 4]
    assert Amount(None, 64).pages(16, 3) == Amount(None, 4, 3)
    assert Amount(None, 8).pages(16, 3).of(seen).tolist() == [2, 3, 3]


def test_exactly_one_budget():
    assert Quest().sparsity == 0.5
    assert Quest(budget_tokens=64).sparsity is None
    with pytest.raises(GossamerError, match="give one of the two"):
        Quest(sparsity=0.5, budget_tokens=64)
    with pytest.raises(GossamerError, match="budget_tokens"):
        Quest(budget_tokens=0)


def test_visible_counts_what_the_mask_shows():
    plain = Layout(1, 3, 10, query_offset=7)
    assert visible(plain).tolist() == [[8, 9, 10]]
    padding = torch.ones(2, 10, dtype=torch.bool)
    padding[1, :4] = False
    padded = Layout(2, 3, 10, query_offset=7, padding=padding)
    assert visible(padded).tolist() == [[8, 9, 10], [4, 5, 6]]


def test_best_keeps_its_own_and_never_what_is_hidden():
    layout = Layout(1, 2, 6, query_offset=4)
    score = torch.tensor([[5.0, 1.0, 4.0, 0.0, 0.0, 9.0]]).expand(1, 1, 2, 6)
    place = best(score, layout, Amount(None, 3), local=1)
    assert sorted(place[0, 0, 0].tolist()) == [0, 2, 4]
    assert sorted(place[0, 0, 1].tolist()) == [0, 2, 5]
    two = best(score, layout, Amount(None, 3), local=2)
    assert sorted(two[0, 0, 0].tolist()) == [0, 3, 4]


def test_padded_rows_keep_as_many_as_alone():
    padding = torch.ones(2, 8, dtype=torch.bool)
    padding[1, :4] = False
    layout = Layout(2, 1, 8, query_offset=7, padding=padding)
    score = torch.arange(8.0).expand(2, 1, 1, 8)
    place = best(score, layout, Amount(0.5, None))
    assert sorted(place[0, 0, 0].tolist()) == [4, 5, 6, 7]
    assert sorted(place[1, 0, 0].tolist()) == [-1, -1, 6, 7]


def test_index_of_places_and_pages():
    layout = Layout(1, 1, 10, query_offset=9)
    place = torch.tensor([[[[7, 2, -1]], [[0, 9, 4]]]])
    index = index_of(layout, place)
    assert index.mask()[0, 0, 0].nonzero()[:, 0].tolist() == [2, 7]
    assert index.mask()[0, 1, 0].nonzero()[:, 0].tolist() == [0, 4, 9]
    assert index.pairs() == (5, 20)
    pages = index_of(layout, torch.tensor([[[[2, 0]]]]), width=4)
    assert pages.mask()[0, 0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 8, 9]
