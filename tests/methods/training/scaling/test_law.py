"""The law of scaling: planted coefficients come back, and runs that cannot tell are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.training.scaling import law as module
from gossamer.methods.training.scaling.law import ScalingLaw, fit_scaling_law

TRUE = ScalingLaw(E=0.7, A=30.0, alpha=0.3, B=200.0, beta=0.35)


def runs(law=TRUE, sizes=(3e5, 1e6, 2e6, 4e6, 8e6), tokens=(1e7, 2e7, 4e7, 8e7), noise=0.0):
    n, d = (values.ravel() for values in np.meshgrid(sizes, tokens))
    error = noise * np.random.default_rng(0).standard_normal(len(n))
    return n, d, law.loss(n, d) * np.exp(error)


def test_the_law_is_the_sum_of_its_terms():
    law = ScalingLaw(E=1.0, A=8.0, alpha=1.5, B=9.0, beta=0.5)
    assert law.loss(4, 9) == 1.0 + 8.0 / 8.0 + 9.0 / 3.0
    assert law.loss([4, 4], [9, 81]).tolist() == [5.0, 3.0]
    assert law.error([4, 4], [9, 81], [4.0, 6.0]) == pytest.approx((0.25 + 0.5) / 2)


@pytest.mark.parametrize(
    "law",
    [
        TRUE,
        ScalingLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28),
        ScalingLaw(E=0.1, A=5.0, alpha=0.15, B=5000.0, beta=0.6),
    ],
)
def test_planted_coefficients_come_back(law):
    found = fit_scaling_law(*runs(law), draws=0)
    assert found.error < 1e-5
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), rel=2e-2), name
    assert found.intervals is None
    assert found.held_out is None


def test_one_bad_run_does_not_move_the_law():
    n, d, losses = runs(noise=1e-4)
    spoiled = losses.copy()
    spoiled[7] *= 1.3
    good, bad = (fit_scaling_law(n, d, v, draws=0).law for v in (losses, spoiled))
    assert bad.alpha == pytest.approx(good.alpha, rel=0.02)
    squares = fit_scaling_law(n, d, spoiled, draws=0, delta=10.0).law
    assert abs(squares.alpha - good.alpha) > 5 * abs(bad.alpha - good.alpha)


def test_intervals_hold_the_truth_and_widen_with_noise():
    widths = []
    for noise in (0.001, 0.01):
        found = fit_scaling_law(*runs(noise=noise), draws=40)
        low, high = found.intervals["alpha"]
        assert low <= found.law.alpha <= high
        assert low <= TRUE.alpha <= high
        widths.append(high - low)
        assert found.error < found.held_out < 10 * noise
        assert f"{found.held_out:.2%}" in str(found)
    assert widths[1] > 3 * widths[0]


@settings(max_examples=3)
@given(st.permutations(range(12)))
def test_the_order_of_runs_decides_nothing(order):
    n, d, losses = runs(sizes=(3e5, 1e6, 4e6, 8e6), tokens=(1e7, 3e7, 9e7), noise=0.005)
    order = list(order)
    first = fit_scaling_law(n, d, losses, draws=3)
    again = fit_scaling_law(n[order], d[order], losses[order], draws=3)
    assert first.law == again.law
    assert first.intervals == again.intervals


def test_gradients_are_those_of_the_objective():
    n, d, losses = runs(noise=0.05)
    x, y = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()
    points = np.array([[0.1, 0.3, -0.2, 0.4, -0.5], [-1.0, 0.6, 0.3, 0.1, 0.2]])
    value, gradient = module._huber(points, x, y, np.log(losses), 0.1)
    for axis in range(5):
        step = np.zeros(5)
        step[axis] = 1e-6
        up, _ = module._huber(points + step, x, y, np.log(losses), 0.1)
        down, _ = module._huber(points - step, x, y, np.log(losses), 0.1)
        assert gradient[:, axis] == pytest.approx((up - down) / 2e-6, rel=1e-5)
    assert value.shape == (2,)


def test_a_bootstrap_never_measures_a_setting_it_fitted(monkeypatch):
    # Seeds of one setting (N, D) are drawn or left out together.
    n, d, losses = (np.tile(v, 3) for v in runs(noise=0.01))
    fit, seen = module._fit, []
    monkeypatch.setattr(module, "_fit", lambda n, *rest: seen.append(n) or fit(n, *rest))
    fit_scaling_law(n, d, losses, draws=5)
    assert all(len(drawn) == len(n) for drawn in seen)
    for drawn in seen[1:]:
        _, counts = np.unique(drawn, return_counts=True)
        assert (counts % 3 == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d, v: (n[:4], d[:4], v[:4]), "4 settings|sizes|number"),
        (lambda n, d, v: (np.full_like(n, 1e6), d, v), "1 size;.*train other sizes"),
        (lambda n, d, v: (n, np.full_like(d, 1e7), v), "1 number of tokens"),
        (lambda n, d, v: (n[:-1], d, v), "19 parameters, 20 tokens, 20 losses"),
        (lambda n, d, v: (n, d, np.where(n > 5e6, np.nan, v)), r"losses\[4\] is nan"),
        (lambda n, d, v: (n, -d, v), r"tokens\[0\] is -1"),
    ],
)
def test_runs_that_cannot_tell_are_refused_in_one_line(change, message):
    with pytest.raises(GossamerError, match=message) as error:
        fit_scaling_law(*change(*runs()))
    assert "\n" not in str(error.value)


def test_too_few_settings_are_refused():
    n, d = np.array([1e6, 2e6, 4e6, 1e6, 1e6]), np.array([1e7, 1e7, 1e7, 2e7, 4e7])
    with pytest.raises(GossamerError, match="5 settings of size and tokens are too few"):
        fit_scaling_law(n, d, TRUE.loss(n, d))


@pytest.mark.parametrize("values", [{"delta": 0.0}, {"level": 1.0}, {"draws": -1}])
def test_bad_options_are_refused(values):
    with pytest.raises(GossamerError):
        fit_scaling_law(*runs(), **values)
