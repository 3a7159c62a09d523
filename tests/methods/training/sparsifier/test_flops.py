"""Operations of a training, counted by hand."""

import pytest
import torch
from torch import nn

from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.sparsifier.flops import (
    TrainingFlops,
    positions_of,
    updates_within,
)


def test_an_update_costs_three_forward_passes_and_a_dense_gradient_what_it_is_short_of():
    flops = TrainingFlops({"a": 100, "b": 50}, {"b": 4.0}, others=10.0)
    kept = {"a": 10, "b": 5}
    # 10 + 4 * 5 + 10 weights, twice each; dense 100 + 4 * 50 + 10.
    assert flops.forward(kept) == 80.0
    flops.count(kept)
    assert flops.total == 240.0
    flops.count(kept, dense_gradient=True)
    assert flops.total == 240.0 + 160.0 + 620.0
    assert flops.dense_total == 2 * 3 * 620.0
    assert flops.share == pytest.approx(1020 / 3720)


@pytest.mark.parametrize("every", [2, 5])
def test_rigl_costs_what_the_paper_says_on_average(every):
    model = nn.Linear(20, 20)
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    method = RigL(sparsity=0.9, steps=40, every=every, until=1.0, allocation="uniform")
    sparsifier = method.attach(model, trains)
    for _ in range(39):
        model(torch.ones(2, 20)).sum().backward()
        trains.step()
        sparsifier.step()
        trains.zero_grad()
    changes = 39 // every
    sparse, dense = 2 * 40.0, 2 * 400.0
    assert sparsifier.flops.dense_gradients == changes
    expected = 3 * sparse * (39 - changes) + changes * (2 * sparse + dense)
    assert sparsifier.flops.total == expected


def test_equal_budgets_buy_more_updates_of_a_sparser_network():
    flops = TrainingFlops({"a": 1000})
    dense = flops.update({"a": 1000})
    sparse = flops.update({"a": 100})
    assert updates_within(dense * 30, sparse) == 300


def test_positions_of_convolutions_and_tokens():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    seen = positions_of(model, ["0", "2"], lambda: model(torch.zeros(7, 3, 6, 6)), 7)
    assert seen == {"0": 16.0, "2": 1.0}
    assert not model[0]._forward_hooks


def test_skipped_layers_count_as_dense():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 2))
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = RandomPruning(sparsity=0.5, steps=1, skip="1").attach(model, trains)
    assert sparsifier.flops.forward(sparsifier.kept()) == 2 * (50 + 20)
