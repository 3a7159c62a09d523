"""The training loop: seeded, clipped, watched, and nothing left behind."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from gossamer.core import GossamerError
from gossamer.methods.training.concrete_ticket import ConcreteTicket
from gossamer.methods.training.random_search import RandomSearch
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.snip import SNIP
from gossamer.models import Inputs, Tokens
from gossamer.models.fit import FitPlan, batches, fit, in_float32
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


class Line(nn.Module):
    """Squared distance of w x from y as its own loss; draws dropout."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(1, 1, bias=False)
        self.idle = nn.Linear(1, 1)
        self.drop = nn.Dropout(0.5)
        nn.init.zeros_(self.map.weight)

    def forward(self, x, y):
        class Out:
            loss = (self.map(x) - y).square().mean() + 0 * self.drop(x).sum()

        return Out


def line(count=16):
    x = torch.linspace(-1, 1, count)[:, None]
    return Inputs({"x": x, "y": 3 * x})


PLAN = FitPlan(steps=60, lr=0.3, batch_size=4)


def test_it_learns_and_leaves_nothing_behind():
    model = Line().eval()
    model.map.weight.grad = mark = torch.ones(1, 1)
    model.idle.requires_grad_(False)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    losses = fit(model, line(), PLAN)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.map.weight.item() == pytest.approx(3.0, abs=0.2)
    assert losses[-1] < 0.05 * losses[0]
    assert not model.training
    assert model.map.weight.grad is mark
    assert not model.idle.weight.requires_grad
    again = Line()
    assert fit(again, line(), PLAN) == losses


def test_batches_are_whole_passes_in_an_order_of_the_seed():
    data = Inputs({"x": torch.arange(10)})
    plan = FitPlan(steps=5, lr=1.0, batch_size=4, seed=3)
    seen = torch.cat([b["x"] for b in batches(data, plan)])
    assert sorted(seen[:10].tolist()) == list(range(10)) == sorted(seen[10:].tolist())
    assert seen[:10].tolist() != seen[10:].tolist()


def test_rates_rise_and_fall():
    plan = FitPlan(steps=10, lr=1.0, warmup=0.2, decay=0.5)
    rates = [plan.rate(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[5:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_the_watcher_sees_the_optimizer_first_and_every_update():
    seen = []

    def watch(optimizer):
        seen.append(optimizer)
        return lambda: seen.append(len(seen))

    fit(Line(), line(), FitPlan(steps=3, lr=0.1, optimizer="sgd"), watch=watch)
    assert isinstance(seen[0], torch.optim.SGD)
    assert seen[1:] == [1, 2, 3]


def test_updates_that_lie_behind_are_left_out_with_their_batches_and_rates():
    rates, seen, done = [], [], []

    def run(**values):
        model = Line()
        model.forward = lambda x, y: seen.append(x) or Line.forward(model, x, y)
        fit(
            model,
            line(),
            FitPlan(steps=10, lr=0.3, batch_size=4, decay=1.0),
            watch=lambda o: lambda: rates.append(o.param_groups[0]["lr"]),
            progress=lambda *a: done.append(a[:2]),
            **values,
        )

    run()
    run(done=7)
    assert rates[10:] == rates[7:10]
    assert all(torch.equal(a, b) for a, b in zip(seen[10:], seen[7:10], strict=True))
    assert done[10:] == [(8, 10), (9, 10), (10, 10)]


def test_only_the_chosen_parameters_move():
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    head = model.lm_head.weight
    fit(model, random_tokens(), FitPlan(steps=1, lr=1e-2), parameters=[head])
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == [n for n, p in model.named_parameters() if p is head]


def test_half_precision_comes_back_as_it_was():
    model = Line().bfloat16()
    with in_float32(model):
        assert model.map.weight.dtype == torch.float32
    assert model.map.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "lr is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"steps": -1}, "steps is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"warmup": 2.0}, "shares of the steps"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"optimizer": "adam"}, "unknown optimizer"),
    ],
)
def test_numbers_that_are_no_training(values, message):
    with pytest.raises(GossamerError, match=message):
        FitPlan(**{"steps": 1, "lr": 1.0, **values})


def test_divergence_is_said():
    data = Inputs({"x": torch.ones(4, 1) * float("inf"), "y": torch.ones(4, 1)})
    with pytest.raises(GossamerError, match="the loss is .* at step 1 of 60; lower"):
        fit(Line(), data, PLAN)
    with pytest.raises(GossamerError, match="no parameter of the model is trainable"):
        fit(Line().requires_grad_(False), line(), PLAN)


def test_windows_of_one_token_are_said_to_be_too_short():
    ids = Tokens.from_ids(torch.full((4, 1), 5))
    with pytest.raises(GossamerError, match="windows of at least two tokens"):
        fit(tiny_model("llama"), ids, FitPlan(steps=1, lr=1e-3))


def bert():
    config = BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


IDS = random_tokens().input_ids


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (random_tokens(), r"first batch, input_ids \(4, 24\)"),
        (
            Inputs({"input_ids": IDS, "labels": torch.full((6,), 7)}),
            r"input_ids \(4, 24\), labels \(4,\): Target 7 is out of bounds; give data",
        ),
    ],
)
def test_data_that_do_not_fit_the_model_fail_in_one_line(data, message):
    with pytest.raises(GossamerError, match=message) as caught:
        fit(bert(), data, FitPlan(steps=2, lr=1e-3, batch_size=4))
    assert "BertForSequenceClassification failed on" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError | IndexError)


@pytest.mark.parametrize("method", [SNIP(steps=1), RandomSearch(steps=1), RigL(steps=1)])
def test_methods_that_look_first_say_the_same(method):
    data = Inputs({"input_ids": IDS, "labels": torch.full((6,), 7)})
    with pytest.raises(GossamerError, match="failed on the first batch.*Target 7"):
        method.apply(bert(), data)


@pytest.mark.parametrize("objective", ["kl", "task"])
def test_a_search_says_the_same(objective):
    method = ConcreteTicket(steps=2, objective=objective)
    wrong = {"kl": Inputs({"pixel_values": IDS.float()}), "task": random_tokens()}[objective]
    with pytest.raises(GossamerError, match=r"failed on a batch, (pixel|input).* \(8, 24\)"):
        method.apply(bert(), wrong)


def test_later_errors_are_not_taken_for_a_mismatch():
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("elsewhere")
        return model(**batch).loss

    with pytest.raises(RuntimeError, match="^elsewhere$"):
        fit(Line(), line(), PLAN, loss=loss)
