"""Scales and the low-rank branch: gradients against autograd, starts as the papers give them."""

import pytest
import torch

from gossamer.methods.training.nm.sides import LowRank, Scale


def sides():
    torch.manual_seed(0)
    weight = torch.randn(6, 8, dtype=torch.float64)
    scale = Scale(weight, 2)
    scale.tensors["scale"].mul_(torch.rand(6, 2, dtype=torch.float64) + 0.5)
    return weight, {"scale": scale, "branch": LowRank(torch.randn(6, 8).double(), 4)}


@pytest.mark.parametrize("name", ["scale", "branch"])
def test_gradients_are_autograds(name):
    weight, made = sides()
    side = made[name]
    wanted = weight.clone().requires_grad_()
    for tensor in side.tensors.values():
        tensor.requires_grad_()
    target = torch.randn(6, 8, dtype=torch.float64)
    (side.shown(wanted) * target).sum().backward()
    gradient = target.clone()
    with torch.no_grad():
        found = side.gradients(weight, gradient)
    assert torch.allclose(gradient, wanted.grad)
    for key, tensor in side.tensors.items():
        assert torch.allclose(found[key], tensor.grad), key


def test_a_scale_starts_as_nothing_and_goes_by_halves():
    weight = torch.arange(8.0).view(1, 8)
    scale = Scale(weight, 2)
    assert torch.equal(scale.shown(weight), weight)
    scale.tensors["scale"].copy_(torch.tensor([[2.0, 3.0]]))
    assert scale.shown(weight).tolist() == [[0, 2, 4, 6, 12, 15, 18, 21]]


def test_the_branch_starts_at_means_of_removed_blocks():
    removed = torch.tensor([[4.0, 0.0, 0.0, 0.0, 0.0, -2.0, 0.0, -6.0]])
    branch = LowRank(removed, 4)
    assert branch.tensors["spread"].tolist() == [[1.0, -2.0]]
    assert branch.tensors["project"].tolist() == [[1] * 4 + [0] * 4, [0] * 4 + [1] * 4]
    assert branch.product.tolist() == [[1.0] * 4 + [-2.0] * 4]


def test_means_reduce_the_error_where_blocks_have_a_mean_and_noise_does_not():
    torch.manual_seed(1)
    removed = (torch.randn(32, 64) + 0.5 * torch.randn(32, 4).repeat_interleave(16, 1)).where(
        torch.rand(32, 64) < 0.5, torch.zeros(32, 64)
    )
    inputs = torch.randn(256, 64) + 1.0
    branch = LowRank(removed, 16)
    without = (inputs @ removed.T).square().sum()
    mean = (inputs @ (removed - branch.product).T).square().sum()
    torch.nn.init.xavier_uniform_(branch.tensors["spread"])
    noise = (inputs @ (removed - branch.product).T).square().sum()
    assert mean < 0.6 * without < 0.6 * noise
