import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.methods.attention.decoding.pages import (
    complete_pages,
    page_scores,
    page_summary,
    remembered_pages,
)
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.memory import LayerState


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4))
def test_the_bound_is_never_below_a_score(seed, page, heads):
    pages = normal(1, 1, 3, page, 5, seed=seed).double()
    query = normal(1, 1, heads, 2, 5, seed=seed + 1).double()
    low, high = page_summary(pages, "minmax")
    bound = page_scores(query, low, high, "minmax")
    true = torch.einsum("bgrqd,bgpkd->bgrqpk", query, pages).amax(-1).sum(2)
    assert (bound >= true - 1e-12).all()
    # One key a page: the box is the key, the bound its score.
    if page == 1:
        torch.testing.assert_close(bound, true)


def test_bound_by_hand():
    pages = torch.tensor([[1.0, -2.0], [3.0, 4.0]]).view(1, 1, 1, 2, 2)
    low, high = page_summary(pages, "minmax")
    query = torch.tensor([2.0, -1.0]).view(1, 1, 1, 1, 2)
    assert page_scores(query, low, high, "minmax").item() == 2 * 3 + 2
    mean, spread = page_summary(pages, "meanstd")
    assert mean.flatten().tolist() == [2.0, 1.0]
    assert spread.flatten().tolist() == [1.0, 3.0]
    want = 2 * 2 - 1 + (4 * 1 + 1 * 9) ** 0.5
    assert page_scores(query, mean, spread, "meanstd").item() == pytest.approx(want)


@pytest.mark.parametrize("scorer", ["minmax", "meanstd"])
def test_heads_of_a_group_are_summed(scorer):
    first, second = page_summary(normal(2, 3, 4, 5, 6), scorer)
    query = normal(2, 3, 2, 1, 6, seed=1)
    both = page_scores(query, first, second, scorer)
    parts = [page_scores(query[:, :, r : r + 1], first, second, scorer) for r in range(2)]
    torch.testing.assert_close(both, parts[0] + parts[1])


@pytest.mark.parametrize("scorer", ["minmax", "meanstd"])
def test_appending_equals_building_anew(scorer):
    key = normal(2, 2, 23, 4)
    state = LayerState()
    for end in (5, 6, 12, 13, 23):
        call = Call(normal(2, 2, 1, 4), key[:, :, :end], key[:, :, :end], state=state)
        layout = Layout(2, 1, end, query_offset=end - 1)
        got = remembered_pages(call, layout, 4, scorer)
        fresh = Call(call.query, call.key, call.value)
        want = remembered_pages(fresh, layout, 4, scorer)
        assert got[0].shape[2] == end // 4
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert state.facts["pages"] == 5
    assert state.seen == 20


def test_what_is_remembered_is_used():
    key = normal(1, 1, 9, 4)
    state = LayerState()
    call = Call(normal(1, 1, 1, 4), key, key, state=state)
    remembered_pages(call, Layout(1, 1, 9, query_offset=8), 4, "minmax")
    state.tensors["first"].fill_(7.0)
    first, *_ = remembered_pages(call, Layout(1, 1, 9, query_offset=8), 4, "minmax")
    assert (first == 7.0).all()


def test_rows_with_padding_have_pages_of_their_own():
    key = normal(2, 1, 12, 4)
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1, :5] = False
    layout = Layout(2, 1, 12, query_offset=11, padding=padding)
    call = Call(normal(2, 1, 1, 4), key, key)
    first, _, start = remembered_pages(call, layout, 3, "minmax")
    assert start.tolist() == [0, 5]
    want = key[1, 0, 5:11].unflatten(0, (2, 3)).amin(1)
    torch.testing.assert_close(first[1, 0, :2], want)
    # The settled ones are those complete in every row.
    assert call.state.facts["pages"] == 2


def test_complete_pages_are_slices():
    key = normal(1, 1, 10, 2)
    pages = complete_pages(key, torch.tensor([2]), 3, 1, 2)
    assert torch.equal(pages[0, 0, 0], key[0, 0, 5:8])


def test_windowed_layers_remember_nothing():
    key = normal(1, 1, 8, 4)
    call = Call(normal(1, 1, 1, 4), key, key)
    remembered_pages(call, Layout(1, 1, 8, query_offset=11, key_offset=4), 4, "minmax")
    assert not call.state.tensors
