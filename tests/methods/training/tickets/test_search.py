"""The search: its first steps by hand, its budget, what it leaves behind."""

import copy
from math import log

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.layers import Layer, find_layers
from gossamer.methods.training.tickets.looking import SearchData
from gossamer.methods.training.tickets.objectives import Frozen, reverse_kl
from gossamer.methods.training.tickets.search import (
    TEMPERATURE,
    Plan,
    concrete_search,
    relaxed,
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4))


def data(rows=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=generator)
    return [(x, torch.randint(0, 4, (rows,), generator=generator))]


def search(model=None, batches=None, **values):
    model = model or net()
    plan = Plan(**{"sparsity": 0.8, "steps": 20, **values})
    return concrete_search(model, find_layers(model), SearchData(batches or data()), plan)


def test_a_concrete_sample_by_hand():
    assert pytest.approx(2 / 3) == TEMPERATURE
    alpha, noise = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.5, 0.5, 0.9])
    expected = [0.5, 1 / (1 + 2.718281828**-1.5), 1 / (1 + 2.718281828 ** (3 - 1.5 * log(9)))]
    assert relaxed(alpha, noise).tolist() == pytest.approx(expected, rel=1e-4)
    assert relaxed(torch.zeros(2), torch.tensor([0.0, 1.0])).isfinite().all()


def test_half_of_the_samples_are_kept_as_often_as_their_logits_say():
    alpha = torch.full((20000,), log(0.2 / 0.8))
    found = relaxed(alpha, torch.rand(20000, generator=torch.Generator().manual_seed(0)))
    # A Concrete sample exceeds 1/2 with probability σ(α), whatever the temperature.
    assert float((found > 0.5).float().mean()) == pytest.approx(0.2, abs=0.01)


def test_the_first_steps_by_hand():
    """Logits after two steps of Adam on what autograd says of the whole expression."""
    sparsity, lr = 0.8, 0.1
    found = search(sparsity=sparsity, steps=2, lr=lr, seed=5)
    model = net().eval()
    frozen = Frozen(model, find_layers(model), SearchData([]))
    alphas = {
        path: torch.full_like(weight, log(0.2 / 0.8)).requires_grad_()
        for path, weight in frozen.weights.items()
    }
    adam = torch.optim.Adam(alphas.values(), lr=lr)
    noise = torch.Generator().manual_seed(5)
    budget = 0.2 * sum(w.numel() for w in frozen.weights.values())
    multiplier = None
    x, _ = data()[0]
    for step in range(2):
        if step == round(0.88 * 2):
            adam.param_groups[0]["lr"] *= 0.1
        masks = {
            path: torch.sigmoid(
                (alpha + torch.special.logit(torch.rand(alpha.shape, generator=noise))) / (2 / 3)
            )
            for path, alpha in alphas.items()
        }
        with torch.no_grad():
            dense = model(x)
        sparse = torch.func.functional_call(
            model, {p: m * frozen.weights[p].detach() for p, m in masks.items()}, (x,)
        )
        value = reverse_kl(sparse, dense)
        kept = sum(a.sigmoid().sum() for a in alphas.values())
        error = 100 * (kept / (1.1 * budget) - 1)
        task = torch.autograd.grad(100 * value, list(alphas.values()))
        towards = torch.autograd.grad(error, list(alphas.values()))
        length = [torch.cat([g.flatten() for g in parts]).norm() for parts in (task, towards)]
        wanted = float(length[0] / length[1]) if float(error.detach()) >= 0 else 0.0
        multiplier = wanted if multiplier is None else 0.99 * multiplier + 0.01 * wanted
        assert found.trace[step].tolist() == pytest.approx(
            [float(value.detach()), float(kept.detach() / budget), multiplier], rel=1e-4, abs=1e-7
        )
        for alpha, ours, theirs in zip(alphas.values(), task, towards, strict=True):
            alpha.grad = ours + multiplier * theirs
        adam.step()
    for layer in find_layers(model):
        assert torch.allclose(found.logits[layer.name], alphas[layer.parameter].detach(), atol=1e-5)


def test_it_starts_under_the_relaxed_budget_and_gradbalance_keeps_it_near():
    found = search(steps=250)
    assert float(found.trace[0, 1]) == pytest.approx(1.0, rel=1e-5)
    assert float(found.trace[0, 2]) == 0.0
    assert 0.9 < found.kept < 1.2
    free = search(steps=100, balance="none")
    assert free.kept > 1.5
    assert not free.trace[:, 2].any()


def test_lagrange_climbs_by_the_error_of_the_unrelaxed_budget():
    trace = search(steps=40, balance="lagrange", lr=0.1).trace.double()
    rate = torch.full((40,), 1e-3, dtype=torch.float64)
    rate[round(0.88 * 40) :] = 1e-4
    climbed = (rate * 100 * (trace[:, 1] - 1)).cumsum(0)
    assert float(trace[0, 2]) == 0.0
    assert torch.allclose(trace[1:, 2], climbed[:-1], atol=1e-4)
    assert float(trace[:, 2].abs().max()) > 0.1


def test_the_objective_falls_and_the_model_stays_as_it_was():
    model = net()
    model[2].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    for objective in ("kl", "norm"):
        found = search(model, steps=100, sparsity=0.5, objective=objective, balance="none")
        assert float(found.trace[-20:, 0].mean()) < float(found.trace[:20, 0].mean())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
        assert bool((model[0].weight.grad == 1).all())


def test_inputs_that_say_nothing_are_the_first_to_go():
    model = net()
    x, _ = data(256)[0]
    x[:, 3:] = 0.0
    found = search(model, batches=[x], steps=300, sparsity=0.6)
    logits = found.logits["0"]
    chosen = logits.flatten().topk(24).indices % 6
    assert int((chosen < 3).sum()) >= 23


def test_weights_without_a_mask_are_kept_whole():
    """Of stacked experts some may be left dense: they are one parameter with the others."""
    stacked = nn.Module()
    stacked.weight = nn.Parameter(torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)))
    stacked.forward = lambda x: torch.tanh(x @ stacked.weight[0].T) + x @ stacked.weight[1].T
    layer = Layer("expert 0", "experts", 0, "weight", (4, 6), expert=0)
    found = concrete_search(
        stacked, (layer,), SearchData([data()[0][0]]), Plan(0.5, 50, balance="none")
    )
    assert found.logits["expert 0"].shape == (4, 6)
    assert float(found.trace[0, 1]) == pytest.approx(1.0, rel=1e-5)
    assert found.memory == 3 * 4 * 48


def test_costs_and_progress():
    seen = []
    model = net()
    looked = SearchData(data(), progress=lambda *a: seen.append(a))
    found = concrete_search(model, find_layers(model), looked, Plan(0.5, 3))
    assert found.forwards == 12
    assert found.memory == 3 * 4 * 200
    assert seen == [(n, 3, "search by kl") for n in (1, 2, 3)]
    assert not found.without_logits().logits


def test_an_objective_that_is_no_number_is_said():
    x = data()[0][0].clone()
    x[0, 0] = float("nan")
    with pytest.raises(GossamerError, match="objective is nan at step 1 of 2; check the batches"):
        search(batches=[x], steps=2)
