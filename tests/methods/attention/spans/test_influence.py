"""Influence against its definition: what the loss does when a pair is really taken out."""

import pytest
import torch

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.moa import MoA
from gossamer.methods.attention.spans.influence import (
    Influence,
    answered,
    lag_influence,
    profile,
    removal_influence,
    samples_of,
)
from gossamer.models import Inputs, Tokens, at_work
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def test_one_removal_is_the_first_order_change_of_the_renormalised_row():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(6, dtype=torch.float64, generator=generator).softmax(0)
    gradient = torch.randn(6, dtype=torch.float64, generator=generator)
    got = removal_influence(weight, gradient)
    for j in range(6):
        rest = weight.clone()
        rest[j] = 0
        torch.testing.assert_close(got[j], gradient @ (rest / rest.sum() - weight))


def test_a_key_that_holds_everything_has_nothing_to_take_its_place():
    found = removal_influence(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 5.0]))
    assert found.tolist() == [-3.0, 0.0]


def naive(call, layout, value_of, sink):
    """Sums along diagonals from the whole T x T map and autograd."""
    shared = call.groups[0]
    query, key = call.grouped_query().double(), call.key.double()
    score = torch.einsum("bgrqd,bgkd->bgrqk", query, key) * call.factor
    if call.softcap is not None:
        score = call.softcap * torch.tanh(score / call.softcap)
    weight = score.masked_fill(~layout.mask()[:, :, None], -torch.inf).softmax(-1)
    weight.requires_grad_(True)
    out = torch.einsum("bgrqk,bgke->bgrqe", weight, call.value.double())
    grad = value_of(out)
    (gradient,) = torch.autograd.grad(out, weight, grad)
    size = layout.keys
    total = torch.zeros(shared, size, dtype=torch.float64)
    influence = removal_influence(weight.detach(), gradient)
    for i in range(size):
        for j in range(sink, i + 1):
            total[:, i - j] += influence[0, :, :, i, j].sum(1)
    return out, grad, total


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5])
def test_sums_along_diagonals_equal_the_full_map(softcap, window, monkeypatch):
    monkeypatch.setattr("gossamer.methods.attention.spans.influence._SCORES", 50)
    generator = torch.Generator().manual_seed(1)

    def draw(heads, width):
        return torch.randn(1, heads, 12, width, dtype=torch.float64, generator=generator)

    call = Call(draw(4, 8), draw(2, 8), draw(2, 6), softcap=softcap)
    layout = Layout(1, 12, 12)
    if window is not None:
        layout = Layout(
            1, 12, 12, causal=False, rule=lambda b, h, q, k: (k <= q) & (q - k < window)
        )
    grad = torch.randn(1, 2, 2, 12, 6, dtype=torch.float64, generator=generator)
    out, grad, want = naive(call, layout, lambda out: grad, sink=2)
    got = lag_influence(call, layout, out.detach().flatten(1, 2), grad.flatten(1, 2), 2)
    torch.testing.assert_close(got, want)


def test_outside_sums_the_far_lags():
    one = Influence(4, (torch.tensor([[1.0, 2.0, 3.0, 4.0]]),))
    assert one.outside(0).tolist() == [[10.0, 9.0, 7.0, 4.0, 0.0]]


def test_a_profile_has_every_layer_and_leaves_the_model_alone():
    model = tiny_model("llama")
    before = [p.requires_grad for p in model.parameters()]
    found = profile(MoA(), model, random_tokens(), (8, 16), answer=4, sink=1)
    assert [one.length for one in found] == [8, 16]
    for one in found:
        assert [lags.shape for lags in one.lags] == [(2, one.length)] * 2
        assert all(bool(lags.any()) for lags in one.lags)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert not at_work(model)


@torch.no_grad()
def test_answers_are_the_models_own():
    model, ids = tiny_model("llama"), random_tokens().input_ids[:1]
    sample = answered(model, ids, 3)
    whole = sample["input_ids"]
    assert whole.shape == (1, 27)
    guess = model(input_ids=whole).logits.argmax(-1)
    assert torch.equal(guess[:, 23:26], whole[:, 24:])
    assert sample["labels"][0].tolist() == [-100] * 24 + whole[0, 24:].tolist()
    itself = answered(model, ids, 0)
    assert torch.equal(itself["labels"][:, 1:], guess[:, :23])


def test_texts_are_cut_to_their_last_real_tokens():
    ids = torch.arange(3, 15).view(1, 12)
    mask = torch.ones_like(ids).bool()
    mask[:, :2] = False
    (sample,) = samples_of(tiny_model("llama"), Tokens(ids, mask), 6, 2)
    assert sample["input_ids"].shape == (1, 6)
    assert sample["input_ids"][0, :4].tolist() == [11, 12, 13, 14]


def test_labels_say_where_not_what_is_scored():
    model, ids = tiny_model("llama"), random_tokens().input_ids[:1]
    labels = torch.full_like(ids, -100)
    labels[:, [5, 20]] = 7
    (sample,) = samples_of(model, Inputs({"input_ids": ids, "labels": labels}), 24, 9)
    assert (sample["labels"] != -100).nonzero()[:, 1].tolist() == [5, 20]
    with torch.no_grad():
        guess = model(input_ids=ids).logits.argmax(-1)
    assert sample["labels"][0, 5] == guess[0, 4]
