"""Running statistics measured anew are the plain means over batches."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.weights.retrain.batchnorm import batch_norms, recompute_batchnorm
from gossamer.models import Inputs


def network():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3), nn.BatchNorm1d(3)
        ).eval()


def run(net, batch):
    return net(batch["x"])


def data(rows=24):
    generator = torch.Generator().manual_seed(1)
    return Inputs({"x": torch.randn(rows, 4, generator=generator) * 3 + 1})


def test_against_float64():
    net, inputs = network(), data()
    with torch.no_grad():
        net[1].running_mean.fill_(7.0)
        net[4].running_var.fill_(9.0)
    assert recompute_batchnorm(net, inputs, batch_size=8, forward=run) == 2
    x = inputs.values["x"].double().view(3, 8, 4)
    hidden = x @ net[0].weight.double().T + net[0].bias.double()
    assert torch.allclose(net[1].running_mean.double(), hidden.mean((0, 1)), atol=1e-5)
    assert torch.allclose(net[1].running_var.double(), hidden.var(1).mean(0), rtol=1e-5)
    # The second sees what the first normalises by each batch's own statistics, without dropout.
    spread = hidden.var(1, keepdim=True, correction=0)
    normal = (hidden - hidden.mean(1, keepdim=True)) / (spread + 1e-5).sqrt()
    out = normal @ net[3].weight.double().T + net[3].bias.double()
    assert torch.allclose(net[4].running_mean.double(), out.mean((0, 1)), atol=1e-5)
    assert torch.allclose(net[4].running_var.double(), out.var(1).mean(0), rtol=1e-4)


def test_modes_and_momentum_are_put_back():
    net = network()
    net[2].train()
    recompute_batchnorm(net, data(), batch_size=8, forward=run)
    assert [m.training for m in net] == [False, False, True, False, False]
    assert [norm.momentum for norm in batch_norms(net)] == [0.1, 0.1]


def test_a_last_sample_alone_is_left_out():
    one, two = network(), network()
    recompute_batchnorm(one, data(17), batch_size=8, forward=run)
    recompute_batchnorm(two, Inputs({"x": data(17).values["x"][:16]}), batch_size=8, forward=run)
    assert torch.equal(one[1].running_var, two[1].running_var)
    assert one[1].num_batches_tracked == 2


def test_models_without_statistics_are_left_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    assert recompute_batchnorm(net, data(), forward=run) == 0
    with pytest.raises(GossamerError, match="batch_size"):
        recompute_batchnorm(network(), data(), batch_size=1, forward=run)
