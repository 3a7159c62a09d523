"""Rewiring: exact counts, each sign for itself, new places uniform among the free ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.methods.training.sparse_autoencoder.rewiring import (
    free_places,
    random_places,
    survivors,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_weakest_of_each_sign_go():
    values = torch.tensor([0.5, -0.1, 0.1, -0.9, 0.2, 0.3, -0.05, -0.4, 0.9, -0.3])
    # A fifth of five positive and of five negative weights: one each.
    gone = (~survivors(values, 0.2)).nonzero()[:, 0]
    assert gone.tolist() == [2, 6]
    assert (~survivors(values, 0.4)).nonzero()[:, 0].tolist() == [1, 2, 4, 6]


def test_one_sign_alone():
    assert survivors(torch.tensor([0.3, 0.1, 0.2, 0.4]), 0.25).tolist() == [1, 0, 1, 1]
    assert survivors(-torch.tensor([0.3, 0.1, 0.2, 0.4]), 0.25).tolist() == [1, 0, 1, 1]


def test_ties_go_against_the_higher_index():
    assert survivors(torch.ones(4), 0.5).tolist() == [1, 1, 0, 0]


@given(st.lists(st.floats(-1, 1, width=32), max_size=60), st.floats(0, 1))
def test_counts_are_exact(values, zeta):
    tensor = torch.tensor(values, dtype=torch.float32)
    keep = survivors(tensor, zeta)
    for side in (tensor >= 0, tensor < 0):
        assert int(keep[side].sum()) == round((1 - zeta) * int(side.sum()))
        if keep[side].any() and (~keep[side]).any():
            assert tensor[side & keep].abs().min() >= tensor[side & ~keep].abs().max()


@given(st.integers(1, 40), st.data())
def test_free_places_are_free_distinct_and_ascending(size, data):
    taken = sorted(data.draw(st.sets(st.integers(0, size - 1))))
    count = data.draw(st.integers(0, size - len(taken)))
    seed = data.draw(st.integers(0, 99))
    found = free_places(torch.tensor(taken, dtype=torch.int64), count, size, generator(seed))
    assert len(found) == count
    assert not set(found.tolist()) & set(taken)
    assert (found.diff() > 0).all()
    assert all(0 <= p < size for p in found.tolist())


@pytest.mark.parametrize("size", [12, 400])
def test_every_free_place_is_as_likely(size):
    """Both ways of drawing: a permutation of few places, repeated draws from many."""
    taken = torch.arange(0, size, 3)
    counts = torch.zeros(size)
    source, rounds, each = generator(), 6000, size // 12
    for _ in range(rounds):
        counts[free_places(taken, each, size, source)] += 1
    assert (counts[taken] == 0).all()
    free = torch.ones(size, dtype=torch.bool)
    free[taken] = False
    share = each / int(free.sum())
    error = (counts[free] / rounds - share).abs().max()
    assert error < 5 * (share * (1 - share) / rounds) ** 0.5


@pytest.mark.parametrize("count", [0, 1, 30, 119, 120])
def test_random_places(count):
    places = random_places(count, (10, 12), generator())
    assert len(places) == count
    assert (places.diff() > 0).all()
    assert count == 0 or 0 <= int(places[0]) <= int(places[-1]) < 120
