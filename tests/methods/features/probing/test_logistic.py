import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from gossamer.methods.features.probing.logistic import STRENGTHS, lasso, reduced, ridge


def problem(rows=40, wide=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, wide, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] - 0.5 * x[:, 1] + noise + 0.3).sign()


def objective(x, y, found, weights, strength, power):
    margin = (x @ found[:-1] + found[-1]) * y
    penalty = found[:-1].square().sum() / 2 if power == 2 else found[:-1].abs().sum()
    return float(penalty + strength * (weights * torch.nn.functional.softplus(-margin)).sum())


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_ridge_is_scikit_learns_minimiser(strength):
    x, y = problem()
    weights = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    (found,) = ridge(x, y, weights[None], torch.tensor([strength], dtype=torch.float64))
    known = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
    known.fit(x.numpy(), y.numpy(), sample_weight=weights.numpy())
    expected = torch.tensor([*known.coef_[0], *known.intercept_], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=1e-5)


def test_held_out_rows_do_not_count_and_problems_do_not_meet():
    x, y = problem()
    weights = torch.ones(2, len(x), dtype=torch.float64)
    weights[0, 20:] = 0
    strength = torch.tensor([1.0, 3.0], dtype=torch.float64)
    both = ridge(x, y, weights, strength)
    alone = ridge(x[:20], y[:20], weights[:1, :20], strength[:1])
    assert torch.allclose(both[:1], alone, atol=1e-6)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.02, 0.3, 2.0]))
def test_lasso_meets_the_conditions_of_its_minimum(seed, strength):
    x, y = problem(30, 4, seed)
    weights = torch.ones(1, len(x), dtype=torch.float64)
    (found,) = lasso(x, y, weights, torch.tensor([strength]).double(), iterations=5000)
    miss = torch.sigmoid(-(x @ found[:-1] + found[-1]) * y) * y
    slope = strength * (miss @ x)
    used = found[:-1] != 0
    assert torch.allclose(slope[used], found[:-1][used].sign(), atol=1e-4)
    assert bool((slope[~used].abs() <= 1 + 1e-4).all())
    assert abs(float(miss.sum())) * strength < 1e-3


def test_a_strong_l1_penalty_leaves_only_the_intercept():
    x, y = problem()
    weights = torch.ones(1, len(x), dtype=torch.float64)
    (found,) = lasso(x, y, weights, torch.tensor([1e-4]).double(), iterations=2000)
    assert not found[:-1].any()
    share = float((y > 0).double().mean())
    assert float(torch.sigmoid(found[-1])) == pytest.approx(share, abs=1e-3)


def test_separable_rows_under_the_weakest_penalty_stay_finite_and_are_separated():
    x, y = problem(12, 30)
    weights = torch.ones(10, 12, dtype=torch.float64)
    small, directions = reduced(x)
    assert small.shape[1] == 12
    found = ridge(small, y, weights, torch.tensor(STRENGTHS, dtype=torch.float64))
    assert torch.isfinite(found).all()
    assert bool((((x @ directions) @ found[0, :-1] + found[0, -1]) * y > 0).all())
    values = [
        objective(small, y, f, weights[0], c, 2) for f, c in zip(found, STRENGTHS, strict=True)
    ]
    assert values == sorted(values, reverse=True)


def test_reduced_rows_keep_every_product():
    x, _ = problem(6, 9)
    small, directions = reduced(x)
    assert torch.allclose(small @ small.T, x @ x.T)
    assert torch.allclose(small @ directions.T, x)
