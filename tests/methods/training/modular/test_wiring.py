"""Which connections a modular layer starts with, counted by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import Budget, Unstructured
from gossamer.methods.training.modular.wiring import group_distance, modular_score, reserved

LAYER, ROW = Unstructured("layer"), Unstructured("row")


def test_distance_between_groups_goes_round_the_ring():
    assert group_distance((4, 8), 4).tolist() == [
        [0, 0, 1, 1, 2, 2, 1, 1],
        [1, 1, 0, 0, 1, 1, 2, 2],
        [2, 2, 1, 1, 0, 0, 1, 1],
        [1, 1, 2, 2, 1, 1, 0, 0],
    ]


def test_sizes_that_groups_do_not_divide_differ_by_one_unit():
    target = group_distance((10, 4), 4)[:, 0]
    assert target.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 1, 1]


def test_what_is_not_reserved_is_the_share_of_the_other_places():
    # 16 of 64 kept: 11 near ones leave 53 places, of which a tenth, 5.3, are connected too.
    assert reserved(64, 16, 0.1) == 11
    assert reserved(64, 16, 0.0) == 16
    assert reserved(64, 16, 0.25) == 0
    assert reserved(64, 4, 0.25) == 0
    assert reserved(64, 64, 0.5) == 64


def test_whole_groups_come_first_then_neighbours():
    like = torch.zeros(8, 8)
    apart = group_distance((8, 8), 4)
    # 16 of 64 fill the target groups exactly; 32 their two neighbours by half.
    for keep, within, beside in [(16, 16, 0), (32, 16, 16)]:
        mask = LAYER.select(modular_score(like, 4, LAYER, keep, 0.0, 3), Budget(keep=keep)).mask()
        assert int(mask[apart == 0].sum()) == within
        assert int(mask[apart == 1].sum()) == beside
        assert not mask[apart == 2].any()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 8),
    st.floats(0.0, 0.9),
    st.floats(0.0, 0.9),
    st.sampled_from([LAYER, ROW]),
)
def test_near_ones_are_reserved_and_the_count_is_exact(
    rows, columns, groups, density, elsewhere, pattern
):
    total = rows * columns if pattern == LAYER else columns
    keep = max(1, round(density * total))
    like = torch.zeros(rows, columns)
    score = modular_score(like, groups, pattern, keep, elsewhere, 0)
    mask = pattern.select(score, Budget(keep=keep)).mask()
    counts = mask.sum(1).tolist() if pattern == ROW else [int(mask.sum())]
    assert counts == [keep] * len(counts)
    apart = group_distance((rows, columns), groups)
    for kept, far in zip(
        mask if pattern == ROW else [mask], apart if pattern == ROW else [apart], strict=True
    ):
        # No set of as many connections as are reserved lies nearer.
        near = reserved(total, keep, elsewhere)
        have = far[kept].sort().values[:near]
        assert torch.equal(have, far.flatten().sort().values[:near])


def test_noise_of_another_seed_is_another_wiring():
    like = torch.zeros(12, 12)
    first, second = (modular_score(like, 4, LAYER, 30, 0.1, seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert pytest.approx(0.5, abs=0.1) == float((first % 1).mean())
