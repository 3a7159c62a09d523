"""G2GNet: modular from the start, and new connections between units that fire together."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from gossamer.core import GossamerError
from gossamer.methods.training.g2gnet import G2GNet
from gossamer.methods.training.modular.wiring import group_distance
from tests.methods.training.test_protocol import assert_zero, batch, net, run
from tests.models.tiny import tiny_model


def attached(method, model=None, lr=1e-9):
    model = net() if model is None else model
    trains = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, trains, method.attach(model, trains)


def test_starts_modular_with_an_exact_count():
    method = G2GNet(steps=10, groups=4, elsewhere=0.0, exchange=0.0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    _, _, sparsifier = attached(method, model)
    for layer in sparsifier.layers:
        mask = sparsifier.mask(layer.name)
        assert torch.equal(mask, group_distance(layer.shape, 4) == 0)
    assert sparsifier.sparsity == 0.75


class Planted(nn.Module):
    """Three inputs of which one follows a unit that reads another: their edge is missing."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(6) + 1e-3)

    def forward(self, x):
        return self.first(x)


def planted(rows, generator, sign):
    """(rows, 6); inputs 2 and 5 are one signal, all others are independent."""
    x = torch.randn(rows, 6, generator=generator)
    x[:, 5] = sign * x[:, 2] + 0.05 * torch.randn(rows, generator=generator)
    return x


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_units_that_fire_together_receive_the_new_connection(sign):
    # Kept: the diagonal and one small weight (0, 1), which is dropped for (2, 5) or (5, 2).
    method = G2GNet(
        steps=40, every=20, watch=10, sparsity=1 - 7 / 36, groups=6, elsewhere=0.0, exchange=0.1
    )
    model, trains, sparsifier = attached(method, Planted())
    mask = torch.eye(6, dtype=torch.bool)
    mask[0, 1] = True
    one = sparsifier.held["first.weight"]
    one.mask.copy_(mask)
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(6))
        model.first.weight[0, 1] = 1e-4
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        mse_loss(model(planted(64, generator, sign)), torch.zeros(64, 6)).backward()
        trains.step()
        sparsifier.step()
        trains.zero_grad()
    grown = (one.mask & ~mask).nonzero().tolist()
    assert grown in ([[2, 5]], [[5, 2]])
    assert not one.mask[0, 1]
    assert int(one.mask.sum()) == 7


def test_gradients_play_no_part_in_growth():
    found = []
    for scale in (1.0, -3.0):
        method = G2GNet(steps=9, every=3, watch=3, groups=4, grown_std=0.0)
        model, trains, sparsifier = attached(method, lr=0.0)
        for step in range(9):
            x, y = batch(step)
            assert not sparsifier.needs_dense_gradient
            (scale * cross_entropy(model(x), y)).backward()
            assert not model[0].weight.grad[~sparsifier.mask("0")].any()
            trains.step()
            sparsifier.step()
            trains.zero_grad()
        found.append({name: sparsifier.mask(name) for name in ("0", "2")})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_dead_units_grow_nothing_while_others_can():
    method = G2GNet(steps=8, every=4, watch=4, sparsity=0.5, groups=1, elsewhere=0.5, exchange=0.3)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model, trains, sparsifier = attached(method, model)
    with torch.no_grad():
        model[0].bias[:4] = -100.0
    mask = sparsifier.mask("2").clone()
    run(model, trains, sparsifier, range(4))
    grown = sparsifier.mask("2") & ~mask
    assert grown.any()
    # Of 16 connections 5 are exchanged, and the four live units have places for them.
    assert not grown[:, :4].any()
    assert all(p.isfinite().all() for p in model.parameters())


def test_masks_hold_and_counts_stay_while_wiring_moves():
    method = G2GNet(steps=12, every=3, watch=2, groups=4)
    model, trains, sparsifier = attached(method, lr=0.05)
    kept, first = sparsifier.kept(), sparsifier.mask("0").clone()
    for step in range(12):
        run(model, trains, sparsifier, [step])
        assert_zero(sparsifier)
        assert sparsifier.kept() == kept
    assert not torch.equal(first, sparsifier.mask("0"))
    work = sparsifier.finish()
    assert not model[0]._forward_hooks
    assert any("correlations before masks change" in note for note in work.report().notes)


def test_listening_costs_what_it_says_and_only_before_changes():
    method = G2GNet(steps=12, every=4, watch=2, groups=4)
    assert [u for u in range(1, 13) if method.listens(u)] == [3, 4, 7, 8]
    model, trains, sparsifier = attached(method)
    run(model, trains, sparsifier, range(2))
    quiet = sparsifier.flops.total
    run(model, trains, sparsifier, [2])
    heard = sparsifier.flops.total - quiet
    assert heard == pytest.approx(quiet / 2 + 2 * 192)
    assert set(sparsifier._moments) == {"0", "2"}
    run(model, trains, sparsifier, [3])
    assert not sparsifier._moments
    assert not any(G2GNet(steps=12, every=4, growth="random").listens(u) for u in range(1, 13))


def test_evaluation_is_not_heard():
    method = G2GNet(steps=12, every=2, watch=2, groups=4)
    model, _, sparsifier = attached(method)
    with torch.no_grad():
        model(batch(0)[0])
    assert not sparsifier._moments
    model(batch(0)[0])
    assert set(sparsifier._moments) == {"0", "2"}


def test_resuming_while_listening_is_bit_exact():
    method = G2GNet(steps=12, every=4, watch=4, groups=4)
    straight, trains, whole = attached(method, lr=0.05)
    run(straight, trains, whole, range(12))
    first, before, half = attached(method, lr=0.05)
    run(first, before, half, range(6))
    saved = copy.deepcopy((first.state_dict(), before.state_dict(), half.state_dict()))
    again = net(seed=1)
    again.load_state_dict(saved[0])
    after = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9)
    after.load_state_dict(saved[1])
    rest = method.attach(again, after, state=saved[2])
    run(again, after, rest, range(6, 12))
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(whole.mask(n), rest.mask(n)) for n in ("0", "2"))


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_transposed_and_stacked_weights_hear_their_own_units(architecture):
    model = tiny_model(architecture)
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    method = G2GNet(steps=4, every=2, watch=2, groups=4)
    model, trains, sparsifier = attached(method, model)
    inputs = {}
    layer = next(x for x in sparsifier.layers if x.transposed or x.expert is not None)
    path = layer.parameter.rpartition(".")[0]
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda m, args, out: inputs.update(x=args[0]))
    model(input_ids=ids, labels=ids).loss.backward()
    handle.remove()
    moments = sparsifier._moments[layer.name]
    assert moments.tensors["covariance"].shape == layer.shape
    if layer.expert is None:
        rows = inputs["x"].detach().reshape(-1, layer.shape[1])
        assert torch.allclose(moments.tensors["mean_before"], rows.mean(0), atol=1e-5)
        behind = rows @ model.get_parameter(layer.parameter) + module.bias
        assert torch.allclose(moments.tensors["mean_behind"], behind.mean(0), atol=1e-5)
    trains.step()
    sparsifier.step()


def test_bad_input():
    with pytest.raises(GossamerError, match="elsewhere 0.3 alone is more than a sparsity of 0.75"):
        G2GNet(elsewhere=0.3)
    with pytest.raises(GossamerError, match="growth"):
        G2GNet(growth="hebbian")
    with pytest.raises(GossamerError, match="0 is a convolution.*skip=convolution"):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        attached(G2GNet(steps=2), model)
