"""The search measures what it says and leaves the network alone."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from gossamer.core import GossamerError
from gossamer.methods.training.search.search import Found, best_of


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(0.5), nn.BatchNorm1d(3))


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
MASKS = [torch.rand(3, 3, generator=torch.Generator().manual_seed(i)) > 0.5 for i in range(5)]


def loss(model):
    return mse_loss(model(X), torch.ones(8, 3))


def draw(number):
    return {"0.weight": MASKS[number]}


def test_the_first_of_the_lowest_wins():
    found = Found((3.0, 1.0, 2.0, 1.0))
    assert (found.best, found.loss, found.mean) == (1, 1.0, 1.75)


def test_losses_are_those_of_the_masked_network_without_dropout():
    model = net()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = best_of(5, draw, model, loss)
    scale = 1 / (1 + model[2].eps) ** 0.5
    for number, value in enumerate(found.losses):
        want = mse_loss(X @ (state["0.weight"] * MASKS[number]).T * scale, torch.ones(8, 3))
        assert value == pytest.approx(float(want), rel=1e-6)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_trial_steps_are_gradient_descent_under_the_mask():
    model = net()
    start = model[0].weight.detach().clone()
    found = best_of(3, draw, model, loss, trial_steps=2, lr=0.5)
    for number, value in enumerate(found.losses):
        twin, mask = net().eval(), MASKS[number]
        with torch.no_grad():
            twin[0].weight.mul_(mask)
        for _ in range(2):
            twin.zero_grad()
            loss(twin).backward()
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter -= 0.5 * parameter.grad
                twin[0].weight.mul_(mask)
        assert value == pytest.approx(loss(twin).item(), rel=1e-5)
    assert torch.equal(model[0].weight, start)


def test_a_network_is_put_back_after_an_error():
    model = net()
    start = model[0].weight.detach().clone()
    with pytest.raises(GossamerError, match="loss is nan under draw 1 of 3"):
        best_of(3, draw, model, lambda m: loss(m) * float("nan"))

    def broken(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        best_of(3, draw, model, broken)
    assert torch.equal(model[0].weight, start)
    assert model.training
