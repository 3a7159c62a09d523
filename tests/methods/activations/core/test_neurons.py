"""Votes, cores and elbows on small arrays."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.activations.core.neurons import (
    Tally,
    chord_elbow,
    contains,
    sentence_core,
    token_core,
    top_count,
)

A = torch.tensor([[1.0, -5.0, 2.0, 0.0], [0.5, 0.1, -9.0, 3.0]])
NORM = torch.tensor([10.0, 1.0, 0.1, 1.0])


def test_a_token_names_a_share_of_the_mean_number_of_positive_activations() -> None:
    assert top_count(A, 1.0) == 2  # (2 + 3) / 2, and halves round to even
    assert top_count(A, 0.4) == 1
    assert top_count(-A.abs(), 0.2) == 1


@pytest.mark.parametrize(
    ("ranking", "expected"),
    [
        ("magnitude", [[0, 1, 1, 0], [0, 0, 1, 1]]),
        ("contribution", [[1, 1, 0, 0], [1, 0, 0, 1]]),
        ("positive", [[1, 0, 1, 0], [1, 0, 0, 1]]),
        ("active", [[1, 0, 1, 0], [1, 1, 0, 1]]),
    ],
)
def test_what_each_ranking_names(ranking, expected) -> None:
    assert token_core(A, ranking, 1.0, NORM).int().tolist() == expected


def test_the_official_ranking_never_names_what_is_not_positive() -> None:
    few = torch.tensor([[1.0, -2.0, -3.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    assert token_core(few, "positive", 1.0, NORM).int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 1]]


def test_a_core_is_ordered_by_votes_then_strength_then_norm_then_index() -> None:
    votes = torch.tensor([[3.0, 2.0, 2.0, 0.0, 0.0, 0.0]])
    strength = torch.tensor([[0.1, 1.0, 50.0, 0.0, 0.0, 0.0]])
    norm = torch.tensor([[1.0, 1.0, 1.0, 1.0, 7.0, 7.0]])
    order = []
    for keep in range(1, 7):
        core = sentence_core(votes, strength, norm, keep)[0]
        assert int(core.sum()) == keep
        order += [j for j in core.nonzero()[:, 0].tolist() if j not in order]
    assert order == [0, 2, 1, 4, 5, 3]


@given(
    st.lists(
        st.tuples(st.integers(0, 200_000), st.floats(0, 1e6, width=32)), min_size=1, max_size=12
    ),
    st.integers(0, 12),
)
def test_no_strength_outweighs_a_vote(pairs, keep) -> None:
    votes = torch.tensor([[float(v) for v, _ in pairs]])
    strength = torch.tensor([[s for _, s in pairs]])
    core = sentence_core(votes, strength, torch.ones_like(votes), keep)[0]
    assert int(core.sum()) == min(keep, len(pairs))
    if 0 < keep < len(pairs):
        assert float(votes[0, core].min()) >= float(votes[0, ~core].max())


def test_votes_add_up_over_passes_and_rows_stay_apart() -> None:
    tally = Tally.empty(2, 1, 4, torch.device("cpu"))
    tally.add(1, 0, A[:1], "positive", 1.0, NORM)
    tally.add(1, 0, A[1:], "positive", 1.0, NORM)
    assert tally.votes[1, 0].tolist() == [2, 1, 1, 1]
    assert tally.strength[1, 0].tolist() == pytest.approx([1.5, 5.1, 11.0, 3.0])
    assert not tally.votes[0].any()
    tally.add(0, 0, A[:0], "positive", 1.0, NORM)
    assert not tally.votes[0].any()
    tally.clear(torch.tensor([False, True]))
    assert not tally.votes.any()


def test_the_share_inside_a_core() -> None:
    votes = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    core = torch.tensor([[True, False, False], [True, True, True]])
    assert contains(votes, core).tolist() == [0.75, 0.0]


def test_nan_has_no_rank() -> None:
    with pytest.raises(GossamerError, match="NaN"):
        token_core(torch.tensor([[math.nan, 1.0, 2.0]]), "magnitude", 0.5, torch.ones(3))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([10, 9, 2, 1.5, 1, 0.5, 0.0], 2),
        ([0, 0, 0, 0, 5], 3),
        ([4, 3, 2, 1, 0], 0),
        ([2, 2, 2], 0),
        ([7, 1], 0),
        ([], 0),
    ],
)
def test_the_elbow_is_the_point_farthest_from_the_chord(values, expected) -> None:
    assert chord_elbow(torch.tensor(values, dtype=torch.float32)) == expected


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=40))
def test_the_elbow_agrees_with_geometric_distances(numbers) -> None:
    y = torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64)
    dx, dy = x[-1] - x[0], y[-1] - y[0]
    distance = (dy * x - dx * (y - y[0])).abs() / math.hypot(dx, dy)
    found = chord_elbow(y)
    assert float(distance[found]) >= float(distance.max()) - 1e-6
