"""Layers behind a mask of learned scores: exact counts, a straight-through gradient, phases."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.architecture.masked import (
    SparseConv2d,
    SparseLinear,
    masked_layers,
    plain,
    sparse,
)


def layer(weight, sparsity=0.5):
    made = SparseLinear(len(weight[0]), len(weight), bias=False, sparsity=sparsity)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
    made.score()
    return made


def test_scores_start_at_the_share_of_the_largest_weight():
    made = layer([[1.0, -4.0], [0.5, 2.0]])
    assert made.scores.tolist() == [[0.25, 1.0], [0.125, 0.5]]
    assert made.shown().tolist() == [[0.0, -4.0], [0.0, 2.0]]


def test_the_gradient_of_the_scores_passes_straight_through_the_mask():
    made = layer([[1.0, -4.0], [0.5, 2.0]])
    x = torch.tensor([[3.0, 5.0]])
    made(x).sum().backward()
    # d loss / d mask = weight * input, for removed weights as well.
    assert made.scores.grad.tolist() == [[3.0, -20.0], [1.5, 10.0]]
    # Weights get the masked network's gradient.
    assert made.weight.grad.tolist() == [[0.0, 5.0], [0.0, 5.0]]


def test_scores_choose_and_fixing_holds_the_choice():
    made = layer([[1.0, -4.0], [0.5, 2.0]])
    with torch.no_grad():
        made.scores.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    made.enter("fixed")
    with torch.no_grad():
        made.scores.neg_()
    assert made.shown().tolist() == [[1.0, 0.0], [0.5, 0.0]]
    made.enter("dense")
    assert torch.equal(made.shown(), made.weight)
    made.enter("learning")
    assert made.shown().tolist() == [[0.0, -4.0], [0.0, 2.0]]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_counts_are_exact_whatever_ties(sparsity):
    made = layer([[1.0] * 10] * 10, sparsity)
    assert int(made.shown().count_nonzero()) == max(1, round(100 * (1 - sparsity)))
    conv = SparseConv2d(2, 5, 3, sparsity=sparsity)
    assert int(conv.shown().count_nonzero()) == max(1, round(90 * (1 - sparsity)))


def test_a_masked_convolution_is_the_convolution_of_its_masked_weights():
    conv = SparseConv2d(2, 4, 3, padding=1, stride=2, sparsity=0.7)
    x = torch.randn(2, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.conv2d(x, conv.shown(), conv.bias, stride=2, padding=1)
    assert torch.equal(conv(x), expected)


def test_networks_become_masked_and_ordinary_again_with_their_zeros():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), SparseLinear(8, 6), nn.Linear(6, 2))
    weight = net[3].weight
    sparse(net, 0.5, learned=False)
    assert [type(m).__name__ for m in net] == ["SparseConv2d", "Flatten"] + ["SparseLinear"] * 2
    assert net[3].weight is weight
    assert [m.learned for m in masked_layers(net).values()] == [False, True, False]
    for made in masked_layers(net).values():
        made.enter("fixed")
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    before = net(x)
    kept = plain(net)
    assert kept == {"0": 9, "2": 24, "3": 6}
    assert [type(m) for m in net] == [nn.Conv2d, nn.Flatten, nn.Linear, nn.Linear]
    assert torch.equal(net(x), before)
    assert int(net[2].weight.count_nonzero()) == 24
    assert set(net.state_dict()) == {f"{i}.{n}" for i in (0, 2, 3) for n in ("weight", "bias")}


def test_a_network_without_weights_is_refused():
    with pytest.raises(GossamerError, match="no linear layer or convolution"):
        sparse(nn.Sequential(nn.ReLU()), 0.5)
