from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.core.schedule import At, Constant, Cosine, Cubic, Schedule, StagedSine, Window


def test_constant_updates_on_time_and_then_no_more():
    assert [step for step in range(12) if Constant(0.5).at(step).update] == [0]
    assert [s for s in range(12) if Constant(0.5, every=3, end=9).at(s).update] == [0, 3, 6]
    assert Constant(0.5, every=3).at(300) == At(0.5, True)


def test_cubic_by_hand():
    schedule = Cubic(0.8, start=10, end=30, every=10)
    values = {10: 0.0, 19: 0.0, 20: 0.8 - 0.8 / 8, 29: 0.7, 30: 0.8, 99: 0.8}
    assert {step: schedule.at(step).sparsity for step in values} == pytest.approx(values)
    assert [step for step in range(50) if schedule.at(step).update] == [10, 20, 30]


@given(st.integers(0, 20), st.integers(1, 60), st.integers(1, 25), st.floats(0, 1))
def test_cubic_ends_where_it_says_and_never_falls(start: int, span: int, every: int, goal: float):
    schedule = Cubic(goal, start, start + span, every)
    values = [schedule.at(step).sparsity for step in range(start + span + 5)]
    assert values[start] == pytest.approx(0.0)
    assert values[start + span] == goal
    assert all(b >= a - 1e-12 for a, b in pairwise(values))
    assert schedule.at(start + span).update
    assert not schedule.at(start + span + 1).update
    changes = [s for s in range(1, len(values)) if values[s] != values[s - 1]]
    assert all(schedule.at(step).update for step in changes)


def test_cosine_goes_half_a_period():
    schedule = Cosine(0.3, 0.0, start=0, end=100, every=50)
    assert [schedule.at(s).sparsity for s in (0, 50, 100, 150)] == pytest.approx([0.3, 0.15, 0, 0])
    assert [s for s in range(200) if schedule.at(s).update] == [0, 50, 100]
    values = [schedule.at(step).sparsity for step in range(120)]
    assert values == sorted(values, reverse=True)


def test_staged_sine_is_continuous_and_reaches_its_peaks():
    schedule = StagedSine(steps=(100, 200, 300), peaks=(0.5, 0.5, 2.0))
    assert [schedule.at(s).sparsity for s in (0, 50, 100, 150, 200, 250, 300)] == pytest.approx(
        [0, 0.25, 0.5, 0.5, 0.5, 1.25, 2.0]
    )
    values = [schedule.at(step).sparsity for step in range(400)]
    assert max(abs(b - a) for a, b in pairwise(values)) < 0.03
    assert schedule.at(299).update
    assert not schedule.at(300).update


def test_window_is_dense_then_cubic_then_fixed():
    schedule = Window(0.6, total=100)
    assert schedule.at(24) == At(0.0, False)
    assert schedule.at(75) == At(0.6, True)
    assert schedule.at(99) == At(0.6, False)
    assert schedule.at(50) == Cubic(0.6, 25, 75).at(50)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(1.5),
        lambda: Constant(0.5, every=-1),
        lambda: Cubic(1.2, 0, 10),
        lambda: Cubic(0.5, 10, 10),
        lambda: Cubic(0.5, 0, 10, every=0),
        lambda: Cosine(0.3, 0.0, 5, 4),
        lambda: StagedSine((), ()),
        lambda: StagedSine((10, 10), (0.1, 0.2)),
        lambda: StagedSine((10,), (0.1, 0.2)),
        lambda: Window(0.5, total=0),
        lambda: Window(0.5, total=100, start=0.8, end=0.2),
    ],
)
def test_schedules_that_make_no_sense_are_refused(make):
    with pytest.raises(GossamerError):
        make()


def test_every_schedule_answers_with_at():
    assert {type(s.at(3)) for s in (Constant(0.5), Cubic(0.5, 0, 9), Cosine(0, 1, 0, 9))} == {At}
    assert issubclass(StagedSine, Schedule)
