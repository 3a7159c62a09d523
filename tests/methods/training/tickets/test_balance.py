"""The multiplier, by worked numbers."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.training.tickets.balance import GradBalance, Lagrange, balancer, norm


def tensors(*values):
    return [torch.tensor(v) for v in values]


def test_a_norm_is_euclidean_over_all_tensors_and_survives_extremes():
    assert float(norm(tensors([3.0, 0.0], [[4.0]]))) == pytest.approx(5.0)
    # The squares leave float32 on either side.
    assert float(norm(tensors([3e-30], [4e-30]))) == pytest.approx(5e-30)
    assert float(norm(tensors([3e30], [4e30]))) == pytest.approx(5e30)
    assert float(norm(tensors([0.0, 0.0]))) == 0.0


def test_a_search_that_starts_under_budget_has_a_multiplier_from_the_first_step():
    """λ* is 0 there; the first one is taken as it is, and later ones are mixed in."""
    balance = GradBalance()
    task, budget = tensors([3.0, 4.0]), tensors([0.0, 0.5])
    assert float(balance.pull(task, budget, torch.tensor(-9.0))) == 0.0
    # At the budget: 5 / 0.5, a hundredth of it.
    assert float(balance.pull(task, budget, torch.tensor(0.0))) == pytest.approx(0.1)
    assert float(balance.pull(task, budget, torch.tensor(2.0))) == pytest.approx(0.199)
    assert float(balance.pull(task, budget, torch.tensor(-1e-6))) == pytest.approx(0.19701)


def test_a_search_that_starts_over_budget_takes_the_first_multiplier_whole():
    balance = GradBalance()
    assert balance.relaxed == 1.1
    found = balance.pull(tensors([3.0, 4.0]), tensors([0.5]), torch.tensor(1.0))
    assert float(found) == pytest.approx(10.0)


def test_lagrange_climbs_by_the_error_and_slows_down_with_the_masks():
    balance = balancer("lagrange", 0.1)
    assert isinstance(balance, Lagrange)
    assert balance.relaxed == 1.0
    nothing = tensors([0.0])
    errors = [-10.0, 20.0, 30.0, 0.0]
    found = []
    for step, error in enumerate(errors):
        if step == 2:
            balance.scale(0.1)
        found.append(float(balance.pull(nothing, nothing, torch.tensor(error))))
    # A step is pulled by what the errors before it made: a thousandth of each, then less.
    assert found == pytest.approx([0.0, -0.01, 0.01, 0.013])


def test_nothing_and_unknown():
    assert float(balancer("none", 0.1).pull([], [], torch.tensor(5.0))) == 0.0
    with pytest.raises(GossamerError, match="unknown balance 'gradbalence'; did you mean gradb"):
        balancer("gradbalence", 0.1)  # type: ignore[arg-type]
