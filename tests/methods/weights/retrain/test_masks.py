"""Masks in the parameters' own layout, and weights that stay removed whatever an optimizer does."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods import make
from gossamer.methods.weights.retrain.masks import (
    apply_masks,
    holding,
    mask_gradients,
    parameter_masks,
)
from tests.models.tiny import tiny_model


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "qwen3_moe"])
def test_masks_lie_where_the_parameters_are_zero(name):
    model = tiny_model(name)
    work = make("magnitude", sparsity=0.5).apply(model)
    masks = parameter_masks(work)
    assert masks
    for path, mask in masks.items():
        assert torch.equal(mask, model.get_parameter(path) != 0), path
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == sum(work.kept.values())


class Restless(torch.optim.Optimizer):
    """Moves every weight at every step, gradient or not, and keeps a state of its own."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["drift"] = torch.ones_like(parameter)
                state["count"] = torch.tensor(1.0)
                parameter.add_(state["drift"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "restless": Restless,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_removed_weights_and_their_state_stay_zero(name):
    torch.manual_seed(0)
    net = nn.Linear(6, 4)
    mask = torch.rand(4, 6) < 0.5
    optimizer = OPTIMIZERS[name](net.parameters())
    # State from before the masks, as when a dense training goes on sparse.
    net(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    before = net.weight.detach().clone()
    with holding(optimizer, net, {"weight": mask}):
        assert bool((net.weight[~mask] == 0).all())
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(3, 6)).square().sum().backward()
            optimizer.step()
            assert bool((net.weight[~mask] == 0).all())
            for value in optimizer.state[net.weight].values():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    assert bool((value[~mask] == 0).all())
    assert bool((net.weight[mask] != before[mask]).all())
    # The hooks are gone: the next step trains everything again.
    optimizer.zero_grad()
    net(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    assert bool((net.weight[~mask] != 0).any())


def test_hooks_go_after_an_error():
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt), holding(optimizer, net, {}):
        raise KeyboardInterrupt
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_gradients_of_removed_weights_count_in_no_norm():
    net = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with holding(optimizer, net, {"weight": torch.tensor([[True, False]])}) as pairs:
        net.weight.grad = torch.tensor([[3.0, 4.0]])
        mask_gradients(pairs)
        assert net.weight.grad.norm() == 3


def test_applying_leaves_plain_zeros():
    net = nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[-1.0, float("nan")]])
    apply_masks(net, {"weight": torch.zeros(1, 2, dtype=torch.bool)})
    assert net.weight.tolist() == [[0.0, 0.0]]
    assert not bool(torch.signbit(net.weight).any())


def test_masks_of_another_network_are_refused():
    net = nn.Linear(2, 1)
    with pytest.raises(GossamerError, match="wieght"):
        apply_masks(net, {"wieght": torch.ones(1, 2, dtype=torch.bool)})
    with pytest.raises(GossamerError, match=r"shape \(2, 2\)"):
        apply_masks(net, {"weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(GossamerError, match="float32"):
        apply_masks(net, {"weight": torch.ones(1, 2)})
