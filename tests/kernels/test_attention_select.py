"""Definitions of the selection kernels: worked cases and properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.core.scores.attention_estimate import block_means as means_estimate
from gossamer.core.scores.attention_estimate import vertical_slash_mass
from gossamer.kernels.attention_select import block_means, last_mass, mass_cut


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
