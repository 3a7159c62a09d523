"""What is kept sparse: layers of any model, in every pattern, with exact counts."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.gmp import GMP
from gossamer.methods.training.granet import GraNet
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.sparsifier.layers import find_layers
from tests.models.tiny import tiny_model


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)
    )


def run(model, method, make, steps):
    trains = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sparsifier = method.attach(model, trains)
    for step in range(steps):
        torch.manual_seed(step)
        make(model).backward()
        trains.step()
        sparsifier.step()
        trains.zero_grad()
    return sparsifier


def conv_loss(model):
    return model(torch.randn(4, 3, 6, 6)).square().mean()


def lm_loss(model):
    ids = torch.randint(3, 128, (2, 12))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("allocation", ["uniform", "er", "erk", "uniform_plus"])
def test_convolutions_count_exactly_and_stay_counted(allocation):
    method = RigL(sparsity=0.6, allocation=allocation, steps=8, every=2)
    sparsifier = run(convnet(), method, conv_loss, 8)
    sizes = {layer.name: layer.size for layer in sparsifier.layers}
    assert sizes == {"0": 216, "2": 576, "4": 128}
    assert sum(sparsifier.kept().values()) == pytest.approx(0.4 * 920, abs=3)
    if allocation == "uniform_plus":
        assert sparsifier.kept()["0"] == 216
        assert sparsifier.kept()["4"] >= round(0.2 * 128)


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        ("row", lambda m: m.sum(1)),
        ("2:4", lambda m: m.reshape(-1, 4).sum(1)),
        ("block:4x4", lambda m: m.view(m.shape[0] // 4, 4, -1, 4).float().mean((1, 3)).unique()),
    ],
)
def test_patterns_hold_while_masks_move(pattern, groups):
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 8))
    method = RigL(pattern=pattern, sparsity=0.5, allocation="uniform", steps=20, every=2)
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = method.attach(model, trains)
    first = {name: sparsifier.mask(name).clone() for name in ("0", "2")}
    wanted = {name: groups(mask) for name, mask in first.items()}
    for step in range(14):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        (model(x) - x[:, :8]).square().sum().backward()
        trains.step()
        sparsifier.step()
        trains.zero_grad()
    for name, mask in first.items():
        assert torch.equal(groups(sparsifier.mask(name)), wanted[name])
        assert not torch.equal(sparsifier.mask(name), mask)
    assert sparsifier.sparsity == 0.5


@pytest.mark.parametrize(("sparsity", "same"), [(None, True), (0.5, False)])
def test_nm_alone_is_the_same_everywhere_and_with_a_sparsity_varies_by_layer(sparsity, same):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    method = RigL(pattern="2:4", sparsity=sparsity)
    sparsifier = method.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    counts = [int(sparsifier.mask(name).reshape(-1, 4)[0].sum()) for name in ("0", "1")]
    assert (counts == [2, 2]) == same


def test_constant_fan_in_is_constant():
    sparsifier = RigL(pattern="row", sparsity=0.7, allocation="uniform", steps=4).attach(
        model := nn.Linear(10, 6), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    assert sparsifier.mask("linear").sum(1).tolist() == [3] * 6


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_stored_turned_or_stacked_layers_are_sparse_along_their_inputs(architecture):
    model = tiny_model(architecture)
    method = RandomPruning(pattern="1:4", steps=2, allocation="uniform")
    sparsifier = run(model, method, lm_loss, 2)
    assert any(layer.transposed or layer.expert is not None for layer in sparsifier.layers)
    for layer in sparsifier.layers:
        weight = layer.view(model.get_parameter(layer.parameter).detach())
        assert tuple(weight.shape) == layer.shape
        assert bool(((weight != 0).reshape(-1, 4).sum(1) <= 1).all())
    assert sparsifier.sparsity == 0.75


def test_granet_and_gmp_follow_the_curve_by_hand():
    model = nn.Linear(20, 20, bias=False)
    method = GMP(sparsity=0.8, steps=8, every=2, until=0.5, pattern="model")
    trains = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = method.attach(model, trains)
    largest = model.weight.detach().abs().flatten().sort(descending=True).indices
    counts = []
    for _ in range(8):
        model(torch.ones(1, 20)).sum().backward()
        trains.step()
        sparsifier.step()
        counts.append(sum(sparsifier.kept().values()))
    # 0.8 (1 - (1 - t)^3) at t = 1/2 is 0.7, at t = 1 it is 0.8.
    assert counts == [400, 120, 120, 80, 80, 80, 80, 80]
    assert set(sparsifier.mask("linear").flatten().nonzero()[:, 0].tolist()) == set(
        largest[:80].tolist()
    )


def test_granet_regenerates_where_the_gradient_is_largest():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    method = GraNet(sparsity=0.5, initial=0.0, steps=100, every=1, until=0.01, exchange=0.5)
    trains = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = method.attach(model, trains)
    (model.weight * torch.tensor([[0.0, 1.0, 2.0, 9.0]])).sum().backward()
    trains.step()
    sparsifier.step()
    # Two stay by size (4 and 3), one of them is dropped, the steepest of the others grows.
    assert sparsifier.mask("linear").tolist() == [[True, False, False, True]]
    assert model.weight.tolist() == [[4.0, 0.0, 0.0, 0.0]]


def test_removed_values_come_back_where_they_are_kept():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    method = GMP(sparsity=0.5, steps=4, every=1, until=0.5, pattern="layer", keep_removed=True)
    trains = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = method.attach(model, trains)
    assert sparsifier.memory()["removed values"] == 16
    for slope in (torch.zeros(1, 4), torch.tensor([[0.0, 2.9, 0.0, 0.0]])):
        (model.weight * slope).sum().backward()
        trains.step()
        sparsifier.step()
        trains.zero_grad()
    # 3 fell to 0.1 and is overtaken by 2, which was removed before.
    assert sparsifier.kept() == {"linear": 2}
    assert model.weight.tolist() == [[4.0, 0.0, 2.0, 0.0]]


def test_what_cannot_be_kept_sparse_is_refused():
    with pytest.raises(GossamerError, match="no linear layer"):
        find_layers(nn.ReLU())
    with pytest.raises(GossamerError, match="computed"):
        find_layers(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    broken = nn.Linear(3, 3)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(GossamerError, match="NaN or infinite"):
        find_layers(broken)
    with pytest.raises(GossamerError, match="is a convolution"):
        model = convnet()
        RigL(pattern="2:4").attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    frozen = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(GossamerError, match="does not train"):
        RigL().attach(frozen, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
