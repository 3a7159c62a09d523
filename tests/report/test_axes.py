from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.report.axes import Scale, linear_ticks, log_ticks, spread


def test_scale_maps_ends_middle_and_clamps():
    scale = Scale(0, 10, 100, 0)
    assert [scale(v) for v in (0, 5, 10, 99, -1)] == [100, 50, 0, 0, 100]
    assert scale.beyond(20) == -100
    log = Scale(1, 100, 0, 200, logarithmic=True)
    assert [log(v) for v in (1, 10, 100)] == pytest.approx([0, 100, 200])


def test_ticks_by_hand():
    assert linear_ticks(0.25, 0.53) == [0.25, 0.3, 0.35, 0.4, 0.45, 0.5]
    assert linear_ticks(3, 3) == [3]
    assert log_ticks(6, 200) == [10, 20, 50, 100, 200]
    assert log_ticks(1, 1e6) == [1, 10, 100, 1e3, 1e4, 1e5, 1e6]
    assert log_ticks(7, 8.5) == [7, 7.25, 7.5, 7.75, 8, 8.25, 8.5]


@given(st.floats(1, 1e4), st.floats(1.02, 1e6))
def test_log_ticks_lie_inside_and_are_few(low: float, factor: float):
    high = low * factor
    ticks = log_ticks(low, high)
    assert ticks == sorted(ticks)
    assert all(low * 0.99 <= t <= high * 1.01 for t in ticks)
    assert len(ticks) <= 11


def test_spread_by_hand():
    assert spread([50, 10], 15, 0, 100) == [50, 10]
    assert spread([50, 50], 10, 0, 100) == [45, 55]
    assert spread([0, 1, 2], 10, 0, 100) == [0, 10, 20]
    assert spread([99, 100], 10, 0, 100) == [90, 100]
    assert spread([5] * 5, 40, 0, 100) == [0, 25, 50, 75, 100]
    assert spread([], 10, 0, 100) == []


@given(st.lists(st.floats(0, 300), max_size=16))
def test_spread_keeps_gap_order_and_bounds(places: list[float]):
    moved = spread(places, 15, 0, 300)
    ranked = [m for _, m in sorted(zip(places, moved, strict=True))]
    assert all(b - a >= 15 - 1e-6 for a, b in pairwise(ranked))
    assert all(-1e-6 <= m <= 300 + 1e-6 for m in moved)
