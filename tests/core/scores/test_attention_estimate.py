import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from gossamer.core.scores.attention_estimate import (
    block_means,
    diagonal_blocks,
    diagonal_sums,
    jensen_shannon,
    last_query_weights,
    mass_count,
    vertical_slash_mass,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(queries=st.integers(1, 6), more=st.integers(0, 9), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_diagonals_are_pairs_equally_far_apart(queries, more, seed):
    keys = queries + more
    weights = torch.rand(2, queries, keys, generator=torch.Generator().manual_seed(seed))
    weights = weights.tril(keys - queries)
    want = torch.zeros(2, keys)
    for i in range(queries):
        for j in range(keys - queries + i + 1):
            want[:, keys - queries + i - j] += weights[:, i, j]
    torch.testing.assert_close(diagonal_sums(weights), want)


def test_last_query_weights_are_the_group_s_mean():
    query, key = randn(2, 3, 2, 4, 8).double(), randn(2, 3, 10, 8, seed=1).double()
    seen = torch.ones(4, 10, dtype=torch.bool).tril(6)[None, None]
    got = last_query_weights(query, key, 0.3, seen, softcap=5.0)
    for b in range(2):
        for g in range(3):
            rows = []
            for r in range(2):
                score = 5.0 * torch.tanh(query[b, g, r] @ key[b, g].T * 0.3 / 5.0)
                rows.append(score.masked_fill(~seen[0, 0], -torch.inf).softmax(-1))
            torch.testing.assert_close(got[b, g], (rows[0] + rows[1]) / 2)


def test_mass_by_key_and_by_distance_sum_to_one():
    query, key = randn(1, 2, 2, 3, 8), randn(1, 2, 12, 8, seed=1)
    seen = torch.ones(3, 12, dtype=torch.bool).tril(9)[None, None]
    vertical, slash = vertical_slash_mass(query, key, 1.0, seen)
    torch.testing.assert_close(vertical.sum(-1), torch.ones(1, 2))
    torch.testing.assert_close(slash.sum(-1), torch.ones(1, 2))


def test_a_query_that_sees_nothing_weighs_nothing():
    seen = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    seen[..., 1, 0] = True
    weights = last_query_weights(randn(1, 1, 1, 2, 4), randn(1, 1, 3, 4), 1.0, seen)
    assert weights[0, 0].tolist() == [[0, 0, 0], [1, 0, 0]]


def test_block_means_worked_example():
    tensor = torch.tensor([[[1.0], [3.0], [5.0], [7.0], [11.0]]])[None]
    assert block_means(tensor, 2)[0, 0, :, 0].tolist() == [2, 6, 11]
    real = torch.tensor([[False, True, True, True, False]])
    assert block_means(tensor, 2, real)[0, 0, :, 0].tolist() == [3, 6, 0]


def test_block_means_keep_every_dimension():
    tensor, real = randn(2, 3, 2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    assert block_means(tensor, 2).shape == (2, 3, 2, 3, 4)
    torch.testing.assert_close(block_means(tensor, 2, real), block_means(tensor, 2))


@given(seed=st.integers(0, 99), size=st.integers(2, 20))
@settings(max_examples=30, deadline=None)
def test_distance_is_scipy_s(seed, size):
    pair = torch.rand(2, size, generator=torch.Generator().manual_seed(seed)).double()
    first, second = pair / pair.sum(1, keepdim=True)
    want = jensenshannon(first.numpy(), second.numpy())
    assert float(jensen_shannon(first, second)) == pytest.approx(float(want), abs=1e-7)


def test_distance_bounds():
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert float(jensen_shannon(first, first)) == 0.0
    assert float(jensen_shannon(first, second)) == pytest.approx(math.sqrt(math.log(2)))


def test_mass_count_worked_example():
    weights = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    counts = [int(mass_count(weights, mass)) for mass in (0.0, 0.4, 0.6, 0.85, 0.95, 2.0)]
    assert counts == [1, 1, 2, 3, 4, 4]


@given(size=st.integers(1, 5), blocks=st.integers(2, 5), apart=st.integers(0, 24))
@settings(max_examples=40, deadline=None)
def test_distances_are_shared_by_the_diagonals_they_cross(size, blocks, apart):
    length = size * blocks
    apart %= length
    slash = torch.zeros(length).index_fill(0, torch.tensor(apart), 1.0)
    got = diagonal_blocks(slash, size)
    # Queries of one block far down, each reading the key so far back.
    at = torch.arange(1000 * size, 1001 * size)
    crossed = 1000 - (at - apart) // size
    want = torch.bincount(crossed, minlength=blocks)[:blocks] / size
    torch.testing.assert_close(got, want.to(got))
