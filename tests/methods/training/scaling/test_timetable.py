"""When weights go: shares of the operations spent, found before the training runs."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.methods.training.scaling.timetable import CURVES, prunings, share_of


def spent_after(found, steps, fixed, update):
    """Operations of the first updates, one at a time."""
    sparsity, spent = 0.0, 0.0
    events = dict(found)
    for step in range(1, update + 1):
        spent += fixed + (1 - fixed) * (1 - sparsity)
        sparsity = events.get(step, sparsity)
    return spent


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("fixed", [0.0, 0.3])
@pytest.mark.parametrize("window", [(0.25, 0.75), (0.0, 0.5), (0.5, 1.0), (0.0, 1.0), (0.1, 0.2)])
def test_sparsity_follows_the_curve_over_operations(curve, fixed, window):
    steps, sparsity = 400, 0.9
    found = prunings(steps, window, curve, sparsity, 5, fixed)
    total = spent_after(found, steps, fixed, steps)
    assert total == pytest.approx(steps * share_of(found, steps, fixed))
    for update, wanted in found[:-1]:
        done = spent_after(found, steps, fixed, update) / total
        x = max(0.0, (done - window[0]) / (window[1] - window[0]))
        # The total is met to about one update, a share of the window's.
        close = 3 * sparsity * 2 / (total * (window[1] - window[0]))
        assert wanted == pytest.approx(sparsity * CURVES[curve](min(x, 1.0)), abs=close)
    last, final = found[-1]
    assert final == sparsity
    assert spent_after(found, steps, fixed, last) / total == pytest.approx(window[1], abs=2 / total)
    gaps = {b - a for (a, _), (b, _) in pairwise(found[:-1])}
    assert gaps <= {5}


def test_shares_of_operations_are_not_shares_of_updates():
    # Half of the operations of a dense half and a half at 90 %: 1 / (0.5 + 0.5 / 0.1) = 2 / 11.
    ((when, sparsity),) = prunings(1100, (0.5, 0.5), "cubic", 0.9, 1, 0.0)
    assert (when, sparsity) == (100, 0.9)
    assert share_of(((100, 0.9),), 1100) == pytest.approx(2 / 11)


def test_what_is_never_removed_costs_too():
    # Of a dense update a fifth stays: after pruning all but a tenth, 0.2 + 0.8 * 0.1 = 0.28.
    ((when, _),) = prunings(1000, (0.5, 0.5), "linear", 0.9, 1, 0.2)
    assert when == pytest.approx(1000 * 0.28 / 1.28, abs=1)


@given(
    steps=st.integers(1, 300),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    curve=st.sampled_from(sorted(CURVES)),
    sparsity=st.floats(0.01, 0.99),
    every=st.integers(1, 50),
    fixed=st.floats(0, 1),
)
def test_any_timetable_rises_and_ends_at_the_sparsity(steps, bounds, curve, sparsity, every, fixed):
    window = (min(bounds), max(bounds))
    found = prunings(steps, window, curve, sparsity, every, fixed)
    updates = [update for update, _ in found]
    assert found[-1][1] == sparsity
    assert 1 <= updates[0] <= updates[-1] <= steps
    assert all(a < b for a, b in pairwise(updates))
    levels = [level for _, level in found]
    assert all(a <= b for a, b in pairwise(levels))
    floor = fixed + (1 - fixed) * (1 - sparsity)
    assert floor - 1e-9 <= share_of(found, steps, fixed) <= 1 + 1e-9


def test_nothing_to_remove_is_nothing_to_do():
    assert prunings(100, (0.25, 0.75), "cubic", 0.0, 10, 0.0) == ()
    assert share_of((), 100) == 1.0


def test_earlier_windows_cost_less():
    shares = [
        share_of(prunings(1000, (start, start + 0.25), "cubic", 0.5, 10, 0.1), 1000, 0.1)
        for start in (0.0, 0.25, 0.5, 0.75)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.75 < shares[-1]
