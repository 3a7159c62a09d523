from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.methods.attention.decoding.choose import Amount
from gossamer.methods.attention.decoding.profile import (
    Costs,
    Profile,
    Profiler,
    anchor_cost,
    best_anchors,
    profile,
)
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from gossamer.models import Tokens
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def tables(layers):
    for rest in product((True, False), repeat=layers - 1):
        table = [0]
        for layer, full in enumerate(rest, 1):
            table.append(layer if full else table[-1])
        yield tuple(table)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 8), st.floats(0, 0.9), st.floats(0, 2))
def test_the_programme_finds_the_cheapest_table(seed, layers, overlap, unlike):
    generator = torch.Generator().manual_seed(seed)
    found = Profile(
        torch.rand(layers, generator=generator) * 0.2,
        torch.rand(layers, layers, generator=generator),
    )
    costs = Costs(unlike=unlike, overlap=overlap, sparse=0.1)
    table = best_anchors(found, costs)
    assert table in set(tables(layers))
    least = min(anchor_cost(other, found, costs) for other in tables(layers))
    assert anchor_cost(table, found, costs) == pytest.approx(least)


def test_layers_that_suffer_or_disagree_stay_full():
    like = torch.ones(4, 4)
    like[:, 2] = 0.4
    found = Profile(torch.tensor([0.0, 0.5, 0.0, 0.0]), like)
    assert best_anchors(found, Costs(tolerance=0.1, overlap=0.5)) == (0, 1, 2, 2)
    assert best_anchors(found, Costs(tolerance=1.0, overlap=0.5)) == (0, 0, 2, 2)
    assert best_anchors(found, Costs(tolerance=1.0, overlap=0.0)) == (0, 0, 0, 0)


def test_what_is_measured():
    def call(seed):
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(1, 2, 20, 4, generator=generator)
        key, value = (torch.randn(1, 1, 20, 4, generator=generator) for _ in range(2))
        return Call(4 * query, key, value)

    profiler, layout = Profiler(Amount(None, 5), 3), Layout(1, 20, 20)
    for layer, seed in enumerate((0, 0, 1)):
        profiler.visit(call(seed), layout, layer)
    found = profiler.found
    assert found.similarity[0, 1] == 1.0
    assert 0.0 <= found.similarity[0, 2] < 1.0
    assert torch.equal(found.similarity.tril(-1), torch.zeros(3, 3))
    assert found.sensitivity[0] == found.sensitivity[1] > 0
    everything = Profiler(Amount(0.0, None), 3)
    everything.visit(call(0), layout, 0)
    assert everything.found.sensitivity[0] == pytest.approx(0.0, abs=1e-6)


def test_agreement_counts_beyond_chance():
    def call(order):
        key = torch.zeros(1, 1, 8, 8)
        key[0, 0, order, torch.arange(8)] = 1.0
        query = torch.arange(8.0, 0.0, -1.0).view(1, 1, 1, 8)
        return Call(query, key, key)

    # Of 8 keys 4 are kept: 3 of them shared is 0.75, of which chance gives 0.5; then 1, then all.
    orders = ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 4, 3, 5, 6, 7], [0, 5, 6, 7, 4, 1, 2, 3])
    profiler, layout = Profiler(Amount(0.5, None), 1), Layout(1, 1, 8, query_offset=7)
    for layer, order in enumerate(orders):
        profiler.visit(call(torch.tensor(order)), layout, layer)
    like = profiler.found.similarity
    assert like[0, 1] == pytest.approx(0.5)
    assert like[0, 2] == 0.0
    assert like.diagonal().tolist() == [1.0, 1.0, 1.0]
    whole = Profiler(Amount(0.0, None), 1)
    for layer, order in enumerate(orders):
        whole.visit(call(torch.tensor(order)), layout, layer)
    assert torch.equal(whole.found.similarity, torch.ones(3, 3).triu())


def test_a_model_is_left_as_it_was_and_padding_is_not_looked_at():
    model = tiny_model("llama")
    ids = random_tokens().input_ids[:2]
    plain = profile(model, Tokens.from_ids(ids), Amount(0.5, None), 4)
    padded = Tokens(
        torch.nn.functional.pad(ids, (0, 5)),
        torch.nn.functional.pad(torch.ones_like(ids), (0, 5)),
    )
    other = profile(model, padded, Amount(0.5, None), 4)
    torch.testing.assert_close(plain.similarity, other.similarity)
    torch.testing.assert_close(plain.sensitivity, other.sensitivity)
    assert model.config._attn_implementation == "sdpa"
