"""One phase of a soup on a network whose training is arithmetic."""

import math

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.weights.retrain.cook import cook, phases_of

MASK = {"weight": torch.tensor([[True, True, False, False]])}


def network():
    net = nn.Linear(4, 1, bias=False)
    net.weight.data = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    return net


def shifts(net, values, start=None):
    """Training that adds a known amount to the first weight."""

    def train(index):
        if start is not None:
            start.append(net.weight.detach().clone())
        net.weight.data[0, 0] += values[index]

    return train


def test_phases_remove_equal_shares_of_what_is_left():
    shares = phases_of(0.875, 3)
    assert shares == pytest.approx([0.5, 0.75, 0.875])
    assert shares[-1] == 0.875
    assert phases_of(0.7, 1) == [0.7]
    assert phases_of(0.0, 3) == [0.0, 0.0, 0.0]


def test_uniform_averages_all_from_one_start():
    net, starts = network(), []
    found = cook(
        net, MASK, 3, shifts(net, (1.0, 2.0, 6.0), starts), lambda: -abs(net.weight.sum().item())
    )
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert net.weight.tolist() == [[4.0, 1.0, 0.0, 0.0]]
    assert found.members == (-3.0, -4.0, -8.0)
    assert (found.soup, found.best, found.mean) == (-5.0, -3.0, -5.0)
    assert found.chosen == (0, 1, 2)


def test_greedy_leaves_out_what_hurts():
    net = network()
    found = cook(
        net,
        MASK,
        3,
        shifts(net, (1.0, -4.0, 40.0)),
        lambda: -abs(net.weight.sum().item()),
        rule="greedy",
    )
    assert found.chosen == (1, 0)
    assert found.soup == -0.5
    assert net.weight.tolist() == [[-0.5, 1.0, 0.0, 0.0]]


def test_refresh_follows_every_average():
    net, calls = network(), []
    cook(net, MASK, 2, shifts(net, (0.0, 1.0)), lambda: 0.0, refresh=lambda: calls.append(1))
    assert calls == [1]


def test_a_score_that_is_no_number_is_the_worst():
    net = network()
    scores = iter((math.nan, -5.0, -6.0, -5.0))
    found = cook(net, MASK, 2, shifts(net, (0.0, 1.0)), lambda: next(scores), rule="greedy")
    assert found.members == (-math.inf, -5.0)
    assert found.chosen == (1,)
    assert found.soup == -5.0


def test_a_copy_that_grew_back_is_refused():
    net = network()

    def revive(index):
        net.weight.data[0, 3] = index

    with pytest.raises(GossamerError, match="1 weights of copy 2 lie outside"):
        cook(net, MASK, 2, revive, lambda: 0.0)
