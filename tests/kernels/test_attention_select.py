"""Definitions of the selection kernels: worked cases and properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.core.scores.attention_estimate import block_means as means_estimate
from gossamer.core.scores.attention_estimate import vertical_slash_mass
from gossamer.kernels.attention_select import (
    Tiling,
    block_lists,
    block_means,
    cover_lines,
    last_mass,
    mass_cut,
    pooled_share,
    top_lines,
)


@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    count=st.integers(1, 7),
    past=st.integers(0, 12),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_last_mass_is_the_estimate_of_core(heads, count, past, softcap, seed):
    g = torch.Generator().manual_seed(seed)
    keys = count + past
    query = torch.randn(2, heads[0], count, 5, generator=g, dtype=torch.float64)
    key = torch.randn(2, heads[1], keys, 5, generator=g, dtype=torch.float64)
    first = torch.randint(0, past + 1, (2,), generator=g)
    place = torch.arange(keys)
    seen = place <= torch.arange(past, keys)[:, None]
    seen = seen & (place >= first.view(-1, 1, 1, 1))
    grouped = query.view(2, heads[1], -1, count, 5)
    expected = vertical_slash_mass(grouped, key, 5**-0.5, seen, softcap)
    found = last_mass(query, key, first=first, softcap=softcap)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), two, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(one.sum(-1), torch.ones(2, heads[1]))


@given(tokens=st.integers(1, 30), block=st.integers(1, 9), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_block_means_are_those_of_core(tokens, block, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, tokens, 4, generator=g)
    first = torch.randint(0, tokens + 1, (2,), generator=g)
    real = torch.arange(tokens) >= first[:, None]
    found = block_means(x, block, first=first)
    torch.testing.assert_close(found, means_estimate(x, block, real), atol=1e-6, rtol=1e-5)


@given(
    values=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    mass=st.floats(0.01, 1.2),
)
@settings(max_examples=100, deadline=None)
def test_the_cut_keeps_the_fewest_largest_that_reach_the_mass(values, mass):
    weights = torch.tensor(values, dtype=torch.float32) / 64
    kept = mass_cut(weights, mass)
    inside, outside = weights[kept], weights[~kept]
    if len(outside):
        assert float(inside.sum()) >= mass - 1e-6
        assert float(inside.min()) >= float(outside.max())
        assert float(inside.sum() - inside.min()) < mass + 1e-6
        ties = (weights == inside.min()).nonzero()[:, 0].tolist()
        kept_ties = [i for i in ties if kept[i]]
        assert kept_ties == ties[: len(kept_ties)]


def test_errors_name_what_is_wrong() -> None:
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(GossamerError, match="are not the last ones of keys"):
        last_mass(x, x[:, :, :4])
    with pytest.raises(GossamerError, match="the kernel needs CUDA"):
        last_mass(x[:, :, :2], x, backend="triton")
    with pytest.raises(GossamerError, match="mass is 0"):
        mass_cut(x[0, 0].abs(), 0.0)
    with pytest.raises(GossamerError, match="block is 0"):
        block_means(x, 0)


def test_one_more_mean_is_of_the_last_tokens() -> None:
    x = torch.arange(14.0).view(1, 1, 7, 2)
    found = block_means(x, 3, tail=True)[0, 0, :, 0].tolist()
    assert found == [2.0, 8.0, 12.0, 10.0]
    assert block_means(x, 9, tail=True)[0, 0, :, 0].tolist() == [6.0, 6.0]


def test_shares_of_pooled_pairs_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 4, 5, generator=g)
    key = torch.randn(1, 1, 6, 5, generator=g)
    share, guess = pooled_share(query, key, base=2, scale=0.7)
    assert share.shape == (1, 1, 3, 6)
    for row in range(4):
        seen = 2 + min(row, 2) + 1
        weights = torch.zeros(6)
        for head in range(2):
            score = 0.7 * (key[0, 0, :seen] @ query[0, head, row])
            weights[:seen] += score.softmax(0) / 2
        found = share[0, 0, row] * 3 if row < 3 else guess[0, 0]
        torch.testing.assert_close(found, weights)


def test_lines_that_cover_a_mass_by_hand() -> None:
    # Key blocks of 2 hold 0.1, 0.5, 0.3, 0.1; block diagonals 0.4, 0.25, 0.05, 0.3.
    vertical = torch.tensor([0.1, 0.0, 0.2, 0.3, 0.3, 0.0, 0.05, 0.05])
    slash = torch.tensor([0.4, 0.0, 0.2, 0.1, 0.0, 0.0, 0.1, 0.2])
    vertical, slash = (x.expand(1, 2, 8) for x in (vertical, slash))
    guess = torch.tensor([[[0.1, 0.5, 0.3, 0.1, 0.0], [0.7, 0.0, 0.0, 0.3, 0.0]]])
    options = {"block": 2, "gamma": 0.75, "tau": 0.05}
    columns, diagonals, good = cover_lines(guess, vertical, slash, **options, least=1)
    assert good.tolist() == [[True, False]]
    assert columns[0, 0].tolist() == [True, True, False, False, False]
    assert columns[0, 1].tolist() == [True, True, True, False, False]
    assert diagonals[0, 0].tolist() == [False, True, False, False, False, False, False]
    assert diagonals[0, 1].tolist() == [False, True, True, False, True, False, False]
    few = cover_lines(guess, vertical, slash, **options, least=3)[0]
    assert few[0, 0].tolist() == [True, True, True, False, False]


def test_best_keys_and_distances_by_hand() -> None:
    vertical = torch.tensor([[[0.0, 0.1, 0.0, 0.4, 0.4, 0.1]] * 2])
    slash = torch.tensor([[[0.1, 0.0, 0.0, 0.9, 0.0, 0.0]] * 2])
    wanted = torch.tensor([[3, 2, 0, -(1 << 30)], [1, 0, 2, 2]], dtype=torch.int32)
    tiling = Tiling(6, 6, 0, 2, 2)
    sizes = {"width": 4, "sink": 1, "local": 1}
    places, columns, diagonals = top_lines(vertical, slash, wanted, tiling, **sizes)
    assert places[0].tolist() == [[0, 3, 4, -1], [0, -1, -1, -1]]
    assert columns[0].tolist() == [[False, False, False], [True, True, False]]
    # Distance 0 lies on diagonal 0, distance 3 on 1 and 2; two latest keys on 0 and 1.
    assert diagonals[0, 0].tolist() == [False, True, True, True, False]
    assert diagonals[0, 1].tolist() == [True, True, True, False, False]


@given(
    chunk=st.sampled_from([(12, 12, 0), (9, 20, 8), (7, 15, 5)]),
    seed=st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_block_lists_name_every_kept_block_once(chunk, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    tiling = Tiling(*chunk, 4, 4)
    n, m = tiling.rows, tiling.columns
    kept = torch.rand(2, 3, n, m, generator=g) < 0.3
    use = torch.rand(2, 3, generator=g) < 0.5
    columns = torch.rand(2, 3, m, generator=g) < 0.3
    diagonals = torch.rand(2, 3, m + 2, generator=g) < 0.3
    indptr, indices = block_lists(tiling, kept=kept, use=use, lines=(columns, diagonals))
    plain = block_lists(tiling, kept=kept)
    for at in range(2 * 3 * n):
        b, h, i = at // (3 * n), at // n % 3, at % n
        begin, end = (int(indptr[b, h, i + step]) for step in (0, 1))
        last = tiling.base + min((i + 1) * 4, tiling.queries) - 1
        want = [
            j
            for j in range(m)
            if 4 * j <= last
            and (
                (use[b, h] and kept[b, h, i, j])
                or columns[b, h, j]
                or diagonals[b, h, i - j + tiling.base // 4 + 1]
            )
        ]
        assert indices[begin:end].tolist() == want
        begin, end = (int(plain[0][b, h, i + step]) for step in (0, 1))
        assert plain[1][begin:end].tolist() == kept[b, h, i].nonzero()[:, 0].tolist()
    with pytest.raises(GossamerError, match="neither a map nor lines"):
        block_lists(tiling)
