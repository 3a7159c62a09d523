import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import Budget, GossamerError, check_sparsity, kept_count


@given(st.integers(0, 10**7), st.floats(0, 1))
def test_kept_count_is_the_rounded_share_and_within_the_total(total: int, sparsity: float):
    kept = kept_count(total, sparsity)
    assert kept == round((1 - sparsity) * total)
    assert 0 <= kept <= total
    assert abs(kept - (1 - sparsity) * total) <= 0.5


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan, math.inf, "half", None])
def test_a_sparsity_outside_its_range_is_refused_by_value(value: object):
    with pytest.raises(GossamerError, match="sparsity is"):
        check_sparsity(value)  # type: ignore[arg-type]


def test_sparsity_comes_back_as_float():
    assert isinstance(check_sparsity(0), float)
    assert check_sparsity(0.999) == 0.999


@pytest.mark.parametrize("fields", [{}, {"sparsity": 0.5, "keep": 2}, {"mass": 0.5, "keep": 2}])
def test_a_budget_is_said_in_exactly_one_way(fields: dict[str, float]):
    with pytest.raises(GossamerError, match="exactly one"):
        Budget(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"sparsity": 1.1}, {"sparsity": math.nan}, {"mass": -0.1}, {"keep": -1}, {"keep": 1.5}],
)
def test_a_budget_out_of_range_is_refused(fields: dict[str, float]):
    with pytest.raises(GossamerError, match="budget"):
        Budget(**fields)


def test_counts():
    assert Budget(sparsity=0.3).count(10) == 7
    assert Budget(keep=12).count(10) == 10
    assert Budget(sparsity=1.0).count(10) == 0
    assert not Budget(threshold=0.1).fixes_count
    with pytest.raises(GossamerError, match="fixes no count"):
        Budget(mass=0.5).count(10)
