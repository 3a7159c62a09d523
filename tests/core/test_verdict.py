"""Paired verdicts against answers known by hand and by scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gossamer.core import GossamerError
from gossamer.core.verdict import check_margin, holm, non_inferiority, samples_needed


def test_a_certain_loss_is_never_passed_and_a_certain_gain_always():
    worse = non_inferiority([1.0] * 40, [0.0] * 20 + [1.0] * 20)
    assert worse.drop == 0.5
    assert worse.p_value > 0.99
    better = non_inferiority([0.0] * 20 + [1.0] * 20, [0.5] * 20 + [1.0] * 20)
    assert better.drop == -0.25
    assert better.p_value < 0.001


def test_p_value_is_that_of_the_shifted_binomial():
    # One sample of 60 is lost; the bootstrap mean is binomial(60, 1/60) / 60, shifted to 0.1.
    dense, sparse = np.ones(60), np.ones(60)
    sparse[7] = 0.0
    found = non_inferiority(dense, sparse, margin=0.1, draws=40_000)
    # mean* - 1/60 + 0.1 <= 1/60 needs fewer than zero losses: impossible.
    assert found.p_value == pytest.approx(1 / 40_001)
    wide = non_inferiority(dense, sparse, margin=0.02, draws=40_000)
    # mean* <= 2/60 - 0.02 = 0.0133 needs no loss at all.
    assert wide.p_value == pytest.approx(stats.binom.pmf(0, 60, 1 / 60), abs=0.01)


def test_bound_of_the_loss_agrees_with_scipy():
    generator = np.random.default_rng(5)
    dense = generator.normal(size=50)
    sparse = dense - generator.normal(0.05, 0.2, size=50)
    ours = non_inferiority(dense, sparse, margin=0.2, level=0.05, draws=20_000)
    theirs = stats.bootstrap(
        (dense - sparse,),
        np.mean,
        confidence_level=0.9,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    )
    assert ours.worst == pytest.approx(theirs.confidence_interval.high, abs=0.004)
    # With many samples the test is the one-sided t-test against the margin.
    t_test = stats.ttest_1samp(dense - sparse, 0.2, alternative="less")
    assert ours.p_value == pytest.approx(t_test.pvalue, abs=0.005)


def test_equal_answers_prove_no_more_than_their_number():
    for count in (20, 148, 149, 400):
        found = non_inferiority(np.ones(count), np.ones(count), margin=0.02)
        assert found.p_value >= 0.98**count - 1e-12
        assert (found.p_value <= 0.05) == (count >= 149)
    assert samples_needed(0.02) == 149
    # A gain among equal answers does not prove more than none.
    dense, sparse = np.ones(30), np.ones(30)
    dense[3] = 0.0
    assert non_inferiority(dense, sparse, margin=0.02).p_value >= 0.98**30


@given(st.floats(0.005, 0.3), st.integers(1, 300))
@settings(deadline=None)
def test_the_samples_needed_are_the_fewest(margin, tests):
    count = samples_needed(margin, tests=tests)
    assert (1 - margin) ** count <= 0.05 / tests + 1e-12
    assert count == 5 or (1 - margin) ** (count - 1) > 0.05 / tests


def test_errors_keep_their_rate():
    # At the edge of the null hypothesis (true loss = margin) about 5 % pass, not more.
    generator = np.random.default_rng(0)
    passed = 0
    for seed in range(200):
        drops = generator.normal(0.1, 0.3, size=60)
        found = non_inferiority(np.zeros(60), -drops, margin=0.1, draws=400, seed=seed)
        passed += found.p_value <= 0.05
    assert 0 < passed <= 22


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1, never falling.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(deadline=None)
def test_holm_lies_between_nothing_and_bonferroni(values):
    adjusted = holm(values)
    for p, q in zip(values, adjusted, strict=True):
        assert p <= q <= min(1.0, p * len(values)) + 1e-12
    order = np.argsort(values, kind="stable")
    assert list(np.asarray(adjusted)[order]) == sorted(adjusted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: non_inferiority([1.0] * 9, [1.0] * 8), "the same samples"),
        (lambda: non_inferiority([1.0] * 4, [1.0] * 4), "too few"),
        (lambda: non_inferiority([1.0] * 9, [float("nan")] * 9), "finite"),
        (lambda: check_margin(0.0), "above 0"),
        (lambda: check_margin("much"), "above 0"),
        (lambda: holm([1.5]), "between 0 and 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(GossamerError, match=message):
        call()
