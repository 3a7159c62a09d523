"""Two segments against a plain search, and what the elbow says of curves without one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.weights.knee.fit import Elbow, fit, joints

X = torch.linspace(0, 0.9, 10, dtype=torch.float64)


def bent(joint, before, after, x=X, base=2.0):
    return base + before * x + (after - before) * (x - joint).clamp_min(0)


def searched(x, y, grid):
    """Least error of a two-segment fit that bends up, joints on a grid, by numpy's lstsq."""
    best = None
    for joint in grid:
        design = np.stack([np.ones_like(x), x, np.maximum(x - joint, 0)], 1)
        answer = np.linalg.lstsq(design, y, rcond=None)[0]
        error = float(((design @ answer - y) ** 2).sum())
        if answer[2] > 1e-12 and (best is None or error < best):
            best = error
    return best


@pytest.mark.parametrize("joint", [0.1, 0.33, 0.5, 0.8])
def test_an_exact_bend_is_found(joint):
    elbow = fit(X, bent(joint, 0.5, 9.0))
    assert elbow.sparsity == pytest.approx(joint, abs=1e-3)
    assert elbow.before == pytest.approx(0.5, abs=0.02)
    assert elbow.after == pytest.approx(9.0, abs=0.02)
    assert elbow.steeper == pytest.approx(18, rel=0.05)
    assert elbow.explained > 0.999
    assert elbow.low is None


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.floats(0.12, 0.75), st.floats(0.01, 1.0))
def test_against_a_plain_search(seed, joint, noise):
    generator = np.random.default_rng(seed)
    x = np.sort(generator.uniform(0.02, 0.98, 9))
    x = np.concatenate([[0.0], x + np.arange(9) * 1e-3])
    y = bent(joint, 0.3, 8.0, torch.tensor(x)).numpy() + noise * generator.standard_normal(10)
    grid = np.concatenate([np.linspace(x[1], x[-2], 1000), x[1:-1]])
    error = searched(x, y, grid)
    elbow = fit(torch.tensor(x), torch.tensor(y))
    design = np.stack([np.ones_like(x), x, np.maximum(x - elbow.sparsity, 0)], 1)
    answer = np.linalg.lstsq(design, y, rcond=None)[0]
    found = float(((design @ answer - y) ** 2).sum())
    # Another joint of the same error is as good.
    assert found <= error * (1 + 1e-9) + 1e-12
    assert elbow.before == pytest.approx(answer[1], rel=1e-6, abs=1e-6)
    assert elbow.after == pytest.approx(answer[1] + answer[2], rel=1e-6, abs=1e-6)
    line = np.polyfit(x, y, 1)
    alone = float(((np.polyval(line, x) - y) ** 2).sum())
    assert elbow.explained == pytest.approx(1 - found / alone, abs=1e-6)


def test_a_curve_that_flattens_rises_from_its_first_point():
    elbow = fit(X, bent(0.4, 9.0, 1.0))
    assert elbow.sparsity == 0.0
    assert elbow.before == elbow.after > 0
    assert elbow.explained == 0.0


def test_scale_and_offset_do_not_move_the_elbow():
    curve = bent(0.47, 1.0, 6.0) + 0.05 * torch.sin(20 * X)
    one, two = fit(X, curve), fit(X, 1000 * curve - 77)
    assert one.sparsity == two.sparsity
    assert one.steeper == pytest.approx(two.steeper, rel=1e-6)


def test_the_interval_holds_the_middle_of_the_draws():
    draws = torch.stack([bent(0.2 + 0.5 * i / 200, 0.5, 9.0) for i in range(201)])
    found = joints(X, draws)
    assert torch.allclose(found, torch.linspace(0.2, 0.7, 201, dtype=torch.float64), atol=1e-3)
    elbow = fit(X, draws[100], draws)
    assert elbow.low == pytest.approx(0.2 + 0.5 * 0.025, abs=2e-3)
    assert elbow.high == pytest.approx(0.2 + 0.5 * 0.975, abs=2e-3)
    assert "95% interval 21" in str(elbow)
    narrow = fit(X, draws[100], draws, level=0.5)
    assert narrow.low == pytest.approx(0.325, abs=3e-3)
    assert narrow.high == pytest.approx(0.575, abs=3e-3)


def test_a_flat_start_is_infinitely_less_steep():
    assert Elbow(0.5, 0.0, 3.0, 1.0).steeper == float("inf")
    assert Elbow(0.5, -1.0, 3.0, 1.0).steeper == float("inf")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:4], X[:4], "4 usable points"),
        (X.flip(0), X, "rise from point to point"),
        (X, X.clone().index_fill_(0, torch.tensor([3]), float("nan")), "no number"),
    ],
)
def test_what_has_no_elbow_is_refused(x, y, message):
    with pytest.raises(GossamerError, match=message):
        fit(x, y)
