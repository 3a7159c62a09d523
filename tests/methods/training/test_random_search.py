"""Random search as a training: exact masks, the best of its draws, its cost, resuming."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer import RandomSearch
from gossamer.core import GossamerError
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 4, (32,), generator=torch.Generator().manual_seed(1))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4)
    )


def loss(model):
    return cross_entropy(model(X), Y)


def attach(method, model=None, **values):
    model = net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return method.attach(model, optimizer, loss=loss, **values)


def run(sparsifier, steps):
    for _ in range(steps):
        loss(sparsifier.model).backward()
        sparsifier.optimizer.step()
        sparsifier.step()
        sparsifier.optimizer.zero_grad()


def test_whole_units_go_and_stay_away():
    sparsifier = attach(RandomSearch(sparsity=0.6, draws=5, steps=20))
    first, second, last = (sparsifier.mask(name) for name in ("0", "2", "4"))
    rows, columns = first.all(1), last.all(0)
    assert torch.equal(first, rows[:, None].expand_as(first))
    assert torch.equal(last, columns[None].expand_as(last))
    assert torch.equal(second, columns[:, None] & rows[None])
    # 160 a + 200 a b + 40 b of the weights, a and b the shares kept of 20 and of 10 units.
    assert (int(rows.sum()), int(columns.sum())) == (11, 5)
    assert sparsifier.sparsity == pytest.approx(1 - (88 + 55 + 20) / 400)
    run(sparsifier, 20)
    for name, mask in (("0", first), ("2", second), ("4", last)):
        assert not sparsifier.model.get_submodule(name).weight.detach()[~mask].any()
    notes = sparsifier.finish().report().notes
    assert any("16 of 30 hidden units stay" in note for note in notes)
    assert any("of 5, " in note and "updates" in note for note in notes)


@pytest.mark.parametrize("space", ["node", "weight"])
def test_the_best_of_its_draws_is_kept(space):
    method = RandomSearch(sparsity=0.5, draws=20, space=space)
    sparsifier = attach(method)
    losses = sparsifier.found.losses
    assert loss(sparsifier.model).item() == pytest.approx(min(losses), rel=1e-6)
    assert len(set(losses)) > 10
    # Further draws come after the first ones.
    assert attach(RandomSearch(sparsity=0.5, draws=5, space=space)).found.losses == losses[:5]
    other = attach(RandomSearch(sparsity=0.5, draws=5, space=space, seed=1)).found.losses
    assert other != losses[:5]


def test_the_search_is_counted():
    cheap = attach(RandomSearch(sparsity=0.5, draws=10, sample_batches=2))
    forward = cheap.flops.forward(cheap.kept())
    assert cheap.flops.total == cheap.search_flops == pytest.approx(20 * forward)
    tried = attach(RandomSearch(sparsity=0.5, draws=10, trial_steps=3))
    assert tried.flops.total == pytest.approx(10 * (1 + 3 * 3) * forward)
    run(cheap, 1)
    assert cheap.flops.total == pytest.approx(23 * forward)


def test_resuming_searches_no_more():
    method = RandomSearch(sparsity=0.5, draws=5, steps=10)
    whole = attach(method)
    run(whole, 10)
    half = attach(method)
    run(half, 4)
    saved = copy.deepcopy((half.model.state_dict(), half.optimizer.state_dict(), half.state_dict()))
    model = net(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    # Without a loss: nothing is measured any more.
    rest = method.attach(model, optimizer, state=saved[2])
    assert rest.found == half.found
    run(rest, 6)
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rest.flops.to_dict() == whole.flops.to_dict()
    assert rest.finish().report().notes == whole.finish().report().notes


def test_a_sparsity_beyond_the_last_unit_says_so():
    sparsifier = attach(RandomSearch(sparsity=0.99, draws=2))
    assert sparsifier.kept() == {"0": 8, "2": 1, "4": 4}
    assert any("0 would be emptied" in text for text in sparsifier.warnings)
    assert not attach(RandomSearch(sparsity=0.9, draws=2)).warnings


def test_a_language_model_loses_inner_neurons_only():
    model = tiny_model("llama")
    method = RandomSearch(sparsity=0.5, draws=3, steps=2, batch_size=3, sample_batches=2)
    with method.apply(model, random_tokens()) as work:
        assert {layer.role for layer in work.layers} == {"mlp.gate", "mlp.up", "mlp.down"}
        gate = work.selection("model.layers.0.mlp.gate_proj").mask()
        down = work.selection("model.layers.0.mlp.down_proj").mask()
        assert torch.equal(gate.all(1), down.all(0))
        assert gate.all(1).sum() == 32


def test_bad_input():
    model = net()
    with pytest.raises(GossamerError, match="attach with loss="):
        RandomSearch().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(GossamerError, match="need space=weight"):
        RandomSearch(pattern="row")
    with pytest.raises(GossamerError, match="need space=weight"):
        RandomSearch(allocation="erk")
    with pytest.raises(GossamerError, match="unknown space"):
        RandomSearch(space="nodes")
    with pytest.raises(GossamerError, match="draws"):
        RandomSearch(draws=0)
    with pytest.raises(GossamerError, match="trial_lr is 0"):
        RandomSearch(trial_lr=0)
    assert RandomSearch(space="weight", pattern="2:4").final_sparsity == 0.5
