"""The retraining loop: what it learns, what it holds still, and what it leaves behind."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods import make
from gossamer.methods.weights.retrain.loop import Plan, batch_of, finetune, orders
from gossamer.methods.weights.retrain.masks import parameter_masks
from gossamer.models import Inputs
from gossamer.models.fit import in_float32
from gossamer.models.loss import window_losses
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def squares(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def line(seed=0, rows=40):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    return Inputs({"x": x, "y": x @ torch.arange(6.0)[:, None]})


def net_of(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Linear(6, 1)


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 12), st.integers(0, 3))
def test_orders_pass_over_the_data_before_they_repeat(count, batch, steps, seed):
    rows = list(orders(count, Plan(steps=steps, batch_size=batch, seed=seed)))
    assert [len(r) for r in rows] == [batch] * steps
    flat = torch.cat(rows).tolist() if rows else []
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == list(range(count))


def test_the_rate_rises_and_falls_to_zero():
    plan = Plan(steps=100, warmup=0.1)
    rates = [plan.rate(step) for step in range(100)]
    peak = rates.index(max(rates))
    assert 8 <= peak <= 11
    assert max(rates) <= 1.0
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[99] == pytest.approx(1 / 90)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert Plan(steps=1).rate(0) > 0.5
    assert Plan(steps=4, warmup=0).rate(0) == 1


def test_one_step_of_sgd_by_hand():
    net, data = net_of(), line(rows=4)
    mask = torch.tensor([[True, False, True, True, False, True]])
    plan = Plan(steps=1, batch_size=4, lr=0.1, warmup=0, optimizer="sgd", clip=None)
    weight = net.weight.detach().double().masked_fill(~mask, 0)
    x, y = data.values["x"].double(), data.values["y"].double()
    error = x @ weight.T + net.bias.detach().double() - y
    expected = weight - 0.1 * (2 * error.T @ x / 4).masked_fill(~mask, 0)
    losses = finetune(net, data, {"weight": mask}, plan, loss=squares)
    assert losses == [pytest.approx(float(error.square().mean()), rel=1e-5)]
    assert torch.allclose(net.weight.detach().double(), expected, atol=1e-5)


def test_clipping_measures_kept_gradients_only():
    net, data = net_of(), line(rows=4)
    mask = torch.tensor([[True, False, False, False, False, False]])
    before = net.weight.detach().masked_fill(~mask, 0).clone()
    bias = net.bias.detach().clone()
    plan = Plan(steps=1, batch_size=4, lr=1.0, warmup=0, optimizer="sgd", clip=0.5)
    finetune(net, data, {"weight": mask}, plan, loss=squares)
    moved = torch.cat([(net.weight - before).flatten(), net.bias - bias])
    assert float(moved.detach().norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_learns_under_the_mask(optimizer):
    net, data = net_of(), line()
    mask = torch.tensor([[False, True, True, True, True, True]])
    plan = Plan(steps=200, lr=0.3 if optimizer == "adamw" else 0.02, optimizer=optimizer, clip=None)
    losses = finetune(net, data, {"weight": mask}, plan, loss=squares)
    # The removed input has coefficient 0, so nothing stands in the way.
    assert losses[-1] < losses[0] / 1000
    assert net.weight[0, 0] == 0
    assert torch.allclose(net.weight.detach()[0, 1:], torch.arange(1.0, 6.0), atol=0.2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_language_models_recover_and_stay_sparse(name):
    model, tokens = tiny_model(name), random_tokens()
    model.config.use_cache = False
    work = make("magnitude", sparsity=0.5).apply(model)
    masks = parameter_masks(work)
    before = window_losses(model, tokens).mean
    finetune(model, tokens, masks, Plan(steps=8, batch_size=4, lr=3e-3))
    assert window_losses(model, tokens).mean < before - 0.05
    for path, mask in masks.items():
        assert not bool(model.get_parameter(path)[~mask].any()), path


def test_it_is_deterministic_and_leaves_no_trace():
    runs = []
    for _ in range(2):
        model = tiny_model("gpt2")  # Has dropout.
        model.transformer.h[0].train()
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        frozen = model.transformer.ln_f.weight.requires_grad_(False)
        modes = [m.training for m in model.modules()]
        state = torch.random.get_rng_state()
        finetune(model, random_tokens(), {}, Plan(steps=2, batch_size=2, seed=3))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert [m.training for m in model.modules()] == modes
        assert bool((model.lm_head.weight.grad == 1).all())
        assert [p.grad for p in model.parameters() if p is not model.lm_head.weight].count(
            None
        ) == len(list(model.parameters())) - 1
        assert bool((frozen == 1).all())
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)
    other = tiny_model("gpt2")
    finetune(other, random_tokens(), {}, Plan(steps=2, batch_size=2, seed=4))
    assert not torch.equal(torch.cat([p.detach().flatten() for p in other.parameters()]), runs[0])


def test_half_precision_keeps_small_updates():
    model = tiny_model("llama").to(torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.fill_(1.0)
    with in_float32(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        for _ in range(8):
            with torch.no_grad():
                weight += 1e-3  # Below bfloat16's spacing at 1, which is 2^-7.
    assert weight.dtype == torch.bfloat16
    assert weight.detach()[0, 0].item() == 1 + 2**-7
    with pytest.raises(KeyboardInterrupt), in_float32(model):
        raise KeyboardInterrupt
    assert weight.dtype == torch.bfloat16


def test_batches_keep_padding_and_labels():
    data = line()
    batch = batch_of(data, torch.tensor([3, 1]))
    assert torch.equal(batch["x"], data.values["x"][[3, 1]])
    tokens = random_tokens()
    assert torch.equal(
        batch_of(tokens, torch.tensor([5, 5]))["input_ids"], tokens.input_ids[[5, 5]]
    )


def test_divergence_is_an_error_that_says_where():
    plan = Plan(steps=50, batch_size=4, lr=1e20, warmup=0, optimizer="sgd", clip=None)
    with pytest.raises(GossamerError, match="at step .* of 50; lower the learning rate"):
        finetune(net_of(), line(), {}, plan, loss=squares)


def test_nothing_to_train_is_an_error():
    net = net_of().requires_grad_(False)
    with pytest.raises(GossamerError, match="requires_grad"):
        finetune(net, line(), {}, Plan(steps=1), loss=squares)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"lr": 0}, "lr is 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"warmup": 1.5}, "share of the steps"),
        ({"clip": 0}, "clip"),
        ({"optimizer": "adam"}, "did you mean adamw"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_plans_are_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        Plan(**{"steps": 1, **values})
