"""The indexer's formula by hand, and its training target."""

import pytest
import torch

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.hisa import HISA
from gossamer.methods.attention.indexer.module import Indexer, index_scores, rotate
from gossamer.methods.attention.indexer.training import (
    divergence,
    summed_attention,
    train_indexers,
)
from gossamer.methods.attention.layout import Layout
from gossamer.models import at_work
from gossamer.models.fit import FitPlan
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_scores_are_a_weighted_sum_of_rectified_products():
    query, weight, key = draw(1, 2, 3, 4), draw(1, 2, 3, seed=1), draw(1, 5, 4, seed=2)
    got = index_scores(query, weight, key)
    for t in range(2):
        for s in range(5):
            products = (query[0, t] @ key[0, s] / 2.0).clamp_min(0)
            assert float(got[0, t, s]) == pytest.approx(float(weight[0, t] @ products), abs=1e-5)
    own = key[:, None].expand(1, 2, 5, 4)
    torch.testing.assert_close(index_scores(query, weight, own), got)


def test_rotated_products_depend_on_distance_only():
    query, key = draw(1, 1, 8), draw(1, 1, 8, seed=1)

    def product(q, k):
        a, b = rotate(query, torch.tensor([[q]]), 4), rotate(key, torch.tensor([[k]]), 4)
        return float((a * b).sum())

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-5)
    assert product(9, 4) != pytest.approx(product(9, 6), abs=1e-3)
    assert torch.equal(rotate(query, torch.tensor([[7]]), 4)[..., 4:], query[..., 4:])


def attention(call, layout):
    query = call.grouped_query()
    score = torch.einsum("bgrqd,bgkd->bgrqk", query, call.key) * call.factor
    return score.masked_fill(~layout.mask()[:, :, None], -torch.inf).softmax(-1)


def test_the_target_is_attention_summed_over_heads_and_scaled():
    call, layout = (
        Call(draw(2, 4, 6, 8), draw(2, 2, 6, 8, seed=1), draw(2, 2, 6, 8)),
        Layout(2, 6, 6),
    )
    rows = torch.tensor([1, 4])
    weights, seen = summed_attention(call, layout, rows)
    want = attention(call, layout).flatten(1, 2).sum(1)[:, rows]
    torch.testing.assert_close(weights, want / want.sum(-1, keepdim=True))
    assert torch.equal(seen, layout.mask()[:, 0, rows])


def test_the_divergence_is_the_textbooks():
    hidden = draw(1, 6, 10, seed=3)
    call = Call(draw(1, 2, 6, 8), draw(1, 1, 6, 8, seed=1), draw(1, 1, 6, 8), hidden=hidden)
    layout, rows, position = Layout(1, 6, 6), torch.arange(6), torch.arange(6)[None]
    torch.manual_seed(0)
    indexer = Indexer(10, 2, 8)
    query, weight = indexer.queries(hidden, position)
    score = index_scores(query, weight, indexer.keys(hidden, position))
    guess = score.masked_fill(~layout.mask()[:, 0], -torch.inf).softmax(-1)
    guess = guess.detach()
    true, _ = summed_attention(call, layout, rows)
    want = sum(
        float(p * (p / q).log())
        for p, q in zip(true.flatten(), guess.flatten(), strict=True)
        if p > 0
    )
    got = divergence(indexer, call, layout, rows, position).detach()
    assert float(got) == pytest.approx(want / 6, abs=1e-5)
    assert float(got) > 0


def test_queries_that_see_nothing_do_not_count():
    padding = torch.ones(1, 6, dtype=torch.bool)
    padding[:, :2] = False
    hidden = draw(1, 6, 10, seed=3)
    call = Call(draw(1, 2, 6, 8), draw(1, 1, 6, 8, seed=1), draw(1, 1, 6, 8), hidden=hidden)
    layout = Layout(1, 6, 6, padding=padding)
    indexer, position = Indexer(10, 2, 8), layout.position.clamp_min(0)
    whole = divergence(indexer, call, layout, torch.arange(6), position)
    real = divergence(indexer, call, layout, torch.arange(2, 6), position)
    assert torch.isfinite(whole)
    torch.testing.assert_close(whole, real)
    whole.backward()
    assert all(torch.isfinite(p.grad).all() for p in indexer.parameters())


def test_training_lowers_the_divergence_and_leaves_the_model_alone():
    model = tiny_model("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(0)
    indexers = {layer: Indexer(32, 2, 8) for layer in range(2)}
    plan = FitPlan(steps=40, lr=2e-2, batch_size=2)
    told = []
    losses = train_indexers(
        HISA(steps=1), model, random_tokens(), indexers, plan, lambda *a: told.append(a)
    )
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert len(told) == 40
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not at_work(model)
