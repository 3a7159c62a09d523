"""Sparse coder: codes that minimise what they say they minimise."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.vision import PENALTIES, SparseCoder
from tests.models.patches import patches

PENALTY = {
    "soft": lambda c: c.abs().sum(),
    "hard": lambda c: (c != 0).double().sum(),
    "cel0": lambda c: (c != 0).double().sum(),
    "half": lambda c: c.abs().sqrt().sum(),
    "group": lambda c: c.unflatten(1, (-1, 4)).norm(dim=2).sum(),
}


def coder(penalty, weight=0.3, steps=400):
    return SparseCoder(16, 24, penalty=penalty, weight=weight, steps=steps, seed=2).double()


def cost(model, x, code):
    error = 0.5 * (x - code @ model.atoms).square().sum()
    return float(error + model.weight * PENALTY[model.penalty](code))


def test_soft_codes_satisfy_the_optimality_conditions_of_l1():
    model, x = coder("soft", steps=3000), patches(20).double()
    code = model.codes(x)
    pull = (x - code @ model.atoms) @ model.atoms.T
    on = code != 0
    assert 0.05 < float(on.double().mean()) < 0.7
    torch.testing.assert_close(pull[on], 0.3 * code[on].sign(), atol=1e-6, rtol=0)
    assert float(pull[~on].abs().max()) <= 0.3 + 1e-6


def test_group_codes_switch_groups_and_satisfy_their_conditions():
    model, x = coder("group", 1.5, steps=3000), patches(20).double()
    code = model.codes(x).unflatten(1, (-1, 4))
    size = code.norm(dim=2)
    assert bool(((code != 0).all(2) | (code == 0).all(2)).all())
    pull = ((x - code.flatten(1) @ model.atoms) @ model.atoms.T).unflatten(1, (-1, 4))
    on = size > 0
    assert 0 < float(on.double().mean()) < 1
    torch.testing.assert_close(pull[on], 1.5 * code[on] / size[on][:, None], atol=1e-6, rtol=0)
    assert float(pull[~on].norm(dim=1).max()) <= 1.5 + 1e-6


@pytest.mark.parametrize("penalty", ["hard", "cel0", "half"])
def test_steps_of_the_other_penalties_go_down_to_a_fixed_point(penalty):
    model, x = coder(penalty, steps=4000), patches(8).double()
    code = model.codes(x)
    length = model.step_length()
    again = model.shrink(code + length * (x - code @ model.atoms) @ model.atoms.T, length)
    torch.testing.assert_close(again, code, atol=1e-4, rtol=0)
    model.steps = 3
    assert cost(model, x, code) <= cost(model, x, model.codes(x)) + 1e-9


@pytest.mark.parametrize("penalty", ["hard", "cel0"])
def test_orthogonal_atoms_are_thresholded_at_the_root_of_two_lambda(penalty):
    model = SparseCoder(8, 8, penalty=penalty, weight=0.5, steps=200).double()
    model.atoms.data = torch.eye(8, dtype=torch.float64)
    x = torch.tensor([[0.2, -0.7, 0.95, 1.05, -1.4, 3.0, 0.0, -5.0]], dtype=torch.float64)
    expected = torch.where(x.abs() > 1, x, 0.0)
    torch.testing.assert_close(model.codes(x), expected, atol=1e-6, rtol=0)


def test_starting_at_l1_beats_starting_at_zero():
    model, x = coder("hard", 0.4), patches(100).double()
    cold = model.codes(x, torch.zeros(100, 24, dtype=torch.float64))
    assert cost(model, x, model.codes(x)) < 0.9 * cost(model, x, cold)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_weight_zero_reconstructs_and_a_huge_one_is_silent(penalty):
    x = patches(10).double()
    torch.testing.assert_close(coder(penalty, 0.0, 3000)(x), x, atol=5e-2, rtol=0)
    assert not bool(coder(penalty, 1e6).codes(x).any())


def test_impossible_settings_are_refused():
    for values, text in (
        ({"penalty": "softt"}, "soft"),
        ({"weight": -1.0}, "weight"),
        ({"steps": 0}, "steps"),
        ({"penalty": "group", "group_size": 5}, "divides 24"),
    ):
        with pytest.raises(GossamerError, match=text):
            SparseCoder(16, 24, **values)
    model = SparseCoder(16, 24)
    with pytest.raises(GossamerError, match=r"\(N, 16\)"):
        model.codes(torch.zeros(2, 9))
    with pytest.raises(GossamerError, match="NaN"):
        model.codes(torch.full((2, 16), torch.nan))
