"""The grid of a comparison."""

import pytest

from gossamer.core import GossamerError
from gossamer.recipes.cells import grid


def shown(cells):
    return [(c.label, round(c.sparsity, 4), c.pattern) for c in cells]


def test_dense_and_random_are_always_there():
    assert shown(grid(["wanda"], [0.5])) == [
        ("dense", 0.0, None), ("random", 0.5, "row"), ("wanda", 0.5, "row"),
    ]  # fmt: skip


def test_patterns_and_sparsities_multiply_where_they_apply():
    cells = grid(["random", "wanda", "teal"], [0.3, 0.5], ["row", "2:4"])
    assert shown(cells)[1:] == [
        ("random", 0.3, "row"), ("random", 0.5, "row"), ("random", 0.5, "2:4"),
        ("wanda", 0.3, "row"), ("wanda", 0.5, "row"), ("wanda", 0.5, "2:4"),
        ("teal", 0.3, None), ("teal", 0.5, None),
    ]  # fmt: skip


def test_what_a_text_fixes_is_not_varied():
    cells = grid(["random", "teal:sparsity=0.25", "wanda:pattern=2:4"], [0.3, 0.5], ["row"])
    assert shown(cells)[3:] == [("teal", 0.25, None), ("wanda", 0.5, "2:4")]
    assert grid(["magnitude:allocation=erk"], [0.5])[-1].label == "magnitude:allocation=erk"


def test_equal_cells_appear_once_and_names_are_unique():
    cells = grid(["wanda", "wanda:pattern=row", "wanda"], [0.5, 0.5])
    assert len(cells) == 3
    many = grid(["random", "magnitude", "lamp"], [0.1, 0.2, 0.3], seed=1)
    assert len({c.name for c in many}) == len(many)
    assert not {c.name for c in many} & {c.name for c in grid(["random"], [0.1], seed=2)} - {
        "dense"
    }


@pytest.mark.parametrize(
    ("names", "sparsities", "patterns", "message"),
    [
        ([], [0.5], [], "no method"),
        (["wanda"], [], [], "no sparsity"),
        (["wandda"], [0.5], [], "did you mean wanda"),
        (["wanda"], [1.0], [], "0 <= sparsity < 1"),
        (["wanda"], [0.5], ["2;4"], "unknown pattern"),
        (["wanda"], [i / 20_000 for i in range(20_000)], [], "at most 10000 cells"),
    ],
)
def test_wrong_grids_are_refused(names, sparsities, patterns, message):
    with pytest.raises(GossamerError, match=message):
        grid(names, sparsities, patterns)
