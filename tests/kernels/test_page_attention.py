"""Definitions of paged decoding: worked cases, the bound, and the choice of pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.kernels.page_attention import (
    page_attention,
    page_bounds,
    page_decode,
    page_scores,
)
from gossamer.kernels.page_attention.reference import choose_reference
from tests.kernels.attention_cases import csr


@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    keys=st.integers(1, 40),
    page=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_listed_pages_are_attention_over_their_keys(batch, heads, keys, page, seed):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads[0], 1, 6, generator=g, dtype=torch.float64)
    key, value = (
        torch.randn(batch, heads[1], keys, 6, generator=g, dtype=torch.float64) for _ in range(2)
    )
    kept = torch.rand(batch, heads[1], 1, -(-keys // page), generator=g) < 0.5
    first = torch.randint(0, keys, (batch,), generator=g)
    end = int(torch.randint(1, keys + 1, (), generator=g))
    found = page_attention(query, key, value, *csr(kept), page, end=end, first=first)
    for b in range(batch):
        for h in range(heads[0]):
            shared = h * heads[1] // heads[0]
            rows = kept[b, shared, 0].repeat_interleave(page)[:keys]
            rows[: int(first[b])] = False
            rows[end:] = False
            own = key[b, shared, rows]
            weight = (own @ query[b, h, 0] / 6**0.5).softmax(0)
            expected = weight @ value[b, shared, rows]
            torch.testing.assert_close(found[b, h, 0], expected)


@given(page=st.sampled_from([1, 4, 16]), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_minima_and_maxima_bound_every_score(page, seed):
    g = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 4, 1, 6, generator=g), torch.randn(2, 2, 37, 6, generator=g)
    bound = page_scores(query, *page_bounds(key, page))
    score = torch.einsum("bgrd,bgkd->bgrk", query[:, :, 0].view(2, 2, 2, 6), key)
    pages = score[..., : 37 // page * page].unflatten(-1, (-1, page)).amax(-1).sum(2)
    assert bound.shape == pages.shape
    assert bool((bound >= pages - 1e-5).all())
    if page == 1:
        torch.testing.assert_close(bound, pages)


def test_mean_and_spread() -> None:
    key = torch.tensor([[[[0.0, 2.0], [2.0, 2.0]]]])
    mean, spread = page_bounds(key, 2, "meanstd")
    assert mean.tolist() == [[[[1.0, 2.0]]]]
    assert spread.tolist() == [[[[1.0, 0.0]]]]
    query = torch.tensor([[[[3.0, 1.0]], [[-3.0, 0.0]]]])
    # 3 + 2 + 3, and -3 + 3.
    assert page_scores(query, mean, spread, "meanstd").tolist() == [[[8.0]]]


def test_the_best_pages_and_the_own_are_chosen_earlier_ones_of_equals() -> None:
    score = torch.tensor([[[1.0, 3.0, 3.0, 2.0, 3.0]]])
    assert choose_reference(score, 3).tolist() == [[[1, 2, 5]]]
    assert choose_reference(score, 1).tolist() == [[[5]]]
    assert choose_reference(score, 6).tolist() == [[[0, 1, 2, 3, 4, 5]]]


def test_decode_reads_what_was_chosen() -> None:
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 8)
    score = page_scores(query, *page_bounds(key[:, :, :64], 16))
    found = page_decode(query, key, value, score, 3, 16)
    kept = torch.zeros(1, 2, 1, 5, dtype=torch.bool)
    kept[..., 4] = True
    kept[0, :, 0].scatter_(1, score[0].topk(2).indices, True)
    expected = page_attention(query, key, value, *csr(kept), 16)
    torch.testing.assert_close(found, expected)
    whole = page_decode(query, key, value, score, 5, 16)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(whole, dense, atol=1e-5, rtol=1e-4)


def test_errors_name_what_is_wrong() -> None:
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 32, 8)
    score = torch.zeros(1, 2, 1)
    with pytest.raises(GossamerError, match="take scores .* and keep 1 to 2 pages; got .* and 3"):
        page_decode(query, key, key, score, 3, 16)
    with pytest.raises(GossamerError, match="the kernel needs CUDA; use backend='reference'"):
        page_decode(query, key, key, score, 1, 16, backend="triton")
    with pytest.raises(GossamerError, match="page scorer"):
        page_bounds(key, 16, "median")  # type: ignore[arg-type]
    with pytest.raises(GossamerError, match="one query a row"):
        page_attention(key, key, key, *csr(torch.ones(1, 1, 1, 2, dtype=torch.bool)), 16)
