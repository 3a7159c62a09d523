"""Single updates against a straight-through reference in autograd."""

import pytest
import torch
from torch import nn

from gossamer.core import NM
from gossamer.methods.training.cast import CAST
from gossamer.methods.training.gradient_flow import GradientFlow
from gossamer.methods.training.sr_ste import SRSTE


def layer():
    torch.manual_seed(3)
    return nn.Linear(8, 4, bias=False).double()


def batches(count):
    torch.manual_seed(4)
    return [torch.randn(5, 8, dtype=torch.float64) for _ in range(count)]


def loss_of(weight, x):
    return (x @ weight.T).tanh().square().sum()


def mask_of(weight, n=2, m=4):
    return NM(n, m).select(weight.detach().abs()).mask()


def trained(method, steps):
    net = layer()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = method.attach(net, optimizer)
    masks = []
    for x in batches(steps):
        masks.append(sparsifier.mask("linear").clone())
        loss_of(net.weight, x).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    return net, sparsifier, masks


def test_sr_ste_is_its_formula():
    net, sparsifier, masks = trained(SRSTE(steps=6, pull=0.5), 6)
    dense = layer().weight.detach().clone()
    for x, mask in zip(batches(6), masks, strict=True):
        assert torch.equal(mask, mask_of(dense))
        shown = (dense * mask).requires_grad_()
        loss_of(shown, x).backward()
        dense = dense - 0.1 * (shown.grad + 0.5 * ~mask * dense)
    assert len({mask.numpy().tobytes() for mask in masks}) > 1
    assert torch.allclose(sparsifier._dense["weight"], dense, atol=1e-12)
    assert torch.allclose(net.weight, dense * mask_of(dense), atol=1e-12)


@pytest.mark.parametrize("through", [False, True])
def test_fading_follows_the_chain_rule_unless_straight_through(through):
    flow = GradientFlow(steps=10, course="linear", dense=0, tune=0.5, straight_through=through)
    net, sparsifier, masks = trained(flow, 4)
    dense = layer().weight.detach().clone()
    for t, x in enumerate(batches(4)):
        beta, mask = 1.0 - t / 5, mask_of(dense)
        assert torch.equal(mask, masks[t])
        factor = torch.where(mask, 1.0, beta).double()
        shown = (dense * factor).requires_grad_()
        loss_of(shown, x).backward()
        dense = dense - 0.1 * shown.grad * (1.0 if through else factor)
    assert torch.allclose(sparsifier._dense["weight"], dense, atol=1e-12)
    factor = torch.where(mask_of(dense), 1.0, 1.0 - 4 / 5)
    assert torch.allclose(net.weight, dense * factor, atol=1e-12)


def test_cast_computes_densely_until_the_end():
    net = layer().float()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    method = CAST(steps=40, pull=1e-1, every=1, distill=0.0)
    sparsifier = method.attach(net, optimizer)
    torch.manual_seed(5)
    first = sparsifier.left_over()
    for _ in range(40):
        assert net.weight.detach().count_nonzero() == 32
        loss_of(net.weight, torch.randn(5, 8)).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    scales = sparsifier._sides["linear"].tensors["scale"].clone()
    dense = sparsifier._dense["weight"].clone()
    assert (scales != 1).any()
    assert sparsifier.left_over() < 0.5 * first
    mask = sparsifier.mask("linear").clone()
    sparsifier.finish()
    # Scales are in the weights: one for each half of the inputs.
    assert torch.allclose(net.weight, dense * mask * scales.repeat_interleave(4, 1))


def test_operations_count_what_each_pass_needs():
    sizes = 32
    for method, update in (
        (SRSTE(steps=4), 2 * 16 * 2 + 2 * sizes),
        (CAST(steps=4, distill=0.0, parts=0), 6 * sizes),
        (CAST(steps=4, distill=0.0), 6 * sizes + 6 * 8),
        (GradientFlow(steps=4, dense=0, tune=0.8), 6 * sizes),
        (GradientFlow(steps=4, course="stepwise", dense=0, tune=0.8, pattern="1:2"), 3 * sizes),
    ):
        net = layer().float()
        optimizer = torch.optim.Adam(net.parameters())
        sparsifier = method.attach(net, optimizer)
        loss_of(net.weight, torch.randn(2, 8)).backward()
        optimizer.step()
        sparsifier.step()
        assert sparsifier.flops.total == update, method
