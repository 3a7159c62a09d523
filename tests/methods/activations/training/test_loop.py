"""The training loop: order, rates, what is left behind, and what is refused."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.activations.training.loop import Training, fit, order, take
from gossamer.models import Inputs, Tokens
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 5))
def test_every_pass_shows_every_sample_once(count, batch, seed):
    stream = torch.cat(list(islice(order(count, batch, seed), 2 * count)))
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count].tolist()) == list(range(count))


def test_order_without_a_seed_is_that_of_the_data():
    assert [b.tolist() for b in islice(order(3, 2, None), 3)] == [[0, 1], [2, 0], [1, 2]]


def test_rate_rises_stays_and_falls():
    plan = Training(steps=100, lr=1.0, batch_size=1, warmup=0.1, decay=0.2)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == pytest.approx([1.0] * 71)
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_take_keeps_masks_with_their_rows():
    tokens = Tokens(torch.arange(6).view(3, 2), torch.tensor([[1, 1], [1, 0], [1, 1]]).bool())
    part = take(tokens, torch.tensor([1, 0]))
    assert isinstance(part, Tokens)
    assert part.input_ids.tolist() == [[2, 3], [0, 1]]
    assert part.attention_mask.tolist() == [[True, False], [True, True]]
    images = take(Inputs({"x": torch.arange(3)}), torch.tensor([2]))
    assert isinstance(images, Inputs)
    assert images.values["x"].tolist() == [2]


def test_fit_lowers_the_loss_and_leaves_flags_and_gradients():
    model = tiny_model("llama")
    frozen = model.lm_head.weight.requires_grad_(False)
    kept = torch.ones(1)
    model.model.norm.weight.grad = kept.expand_as(model.model.norm.weight)
    before = frozen.clone()
    plan = Training(steps=12, lr=3e-3, batch_size=3)
    losses = fit(model, random_tokens(), plan, parameters=model.model.layers.parameters())
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert torch.equal(frozen, before)
    assert not frozen.requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
    assert model.model.norm.weight.grad is not None


def test_the_extra_term_is_trained_on_and_not_reported():
    def run(weight):
        model = tiny_model("llama")
        gain = model.model.norm.weight
        fit(
            model,
            random_tokens(),
            Training(steps=5, lr=1e-2, batch_size=3),
            extra=(lambda step: weight * gain.square().sum()) if weight else None,
        )
        return float(gain.detach().square().sum())

    assert run(10.0) < run(0.0)


def test_an_interrupt_puts_gradients_back():
    model = tiny_model("llama")

    def stop(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, random_tokens(), Training(steps=1, lr=1e-3, batch_size=3), progress=stop)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_diverging_loss_is_named():
    model = nn.Linear(2, 1)
    data = Inputs({"x": torch.ones(4, 2)})
    plan = Training(steps=3, lr=1e-3, batch_size=2)
    with pytest.raises(GossamerError, match="the loss is nan at step 3; lower lr"):
        fit(model, data, plan, loss=lambda m, batch: m(batch["x"]).sum() * float("nan"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -3}, "seed is -3"),
    ],
)
def test_impossible_plans_are_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        Training(**{"steps": 1, "lr": 1.0, "batch_size": 1, **values})
