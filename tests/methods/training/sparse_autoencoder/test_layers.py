"""The two forms of a layer against each other, and against autograd."""

import pytest
import torch

from gossamer.methods.training.sparse_autoencoder.layers import (
    Descent,
    MaskedLayer,
    StoredLayer,
    initial,
)
from gossamer.methods.training.sparse_autoencoder.training import Network, Plan, network

DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = generator(seed)
    x = torch.randn(11, 20, generator=source, dtype=DOUBLE)
    return x, torch.randn(7, 20, generator=source, dtype=DOUBLE)


@pytest.mark.parametrize("form", [StoredLayer, MaskedLayer])
def test_an_update_by_hand(form):
    layer = form(initial((2, 2), 1, generator(), DOUBLE))
    matrix = layer.connections()
    at, before = int(matrix.places()[0]), float(matrix.values[0])
    row, column = divmod(at, 2)
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=DOUBLE)
    delta = torch.tensor([[1.0, -1.0], [2.0, 4.0]], dtype=DOUBLE)
    gradient = float((delta[row] * x[column]).mean())
    descent = Descent(lr=0.5, momentum=0.9, decay=0.01)
    layer.update(delta, x, descent)
    first = 0.99 * before - 0.5 * gradient
    assert float(layer.connections().values[0]) == pytest.approx(first)
    layer.update(delta, x, descent)
    velocity = -0.9 * 0.5 * gradient - 0.5 * gradient
    assert float(layer.connections().values[0]) == pytest.approx(0.99 * first + velocity)
    assert layer.bias.tolist() == pytest.approx([0.0, -0.5 * 3 * 0.99 - 0.95 * 3])


def test_both_forms_take_the_same_course():
    start = initial((7, 11), 25, generator(), DOUBLE)
    start_too = initial((7, 11), 25, generator(), DOUBLE)
    stored, masked = StoredLayer(start), MaskedLayer(start_too)
    sources = generator(5), generator(5)
    for turn in range(6):
        x, delta = batches(turn)
        assert torch.allclose(stored.forward(x), masked.forward(x), atol=1e-12)
        assert torch.allclose(stored.backward(delta), masked.backward(delta), atol=1e-12)
        for layer, source in zip((stored, masked), sources, strict=True):
            layer.update(delta, x, Descent(lr=0.05))
            if turn % 2:
                layer.rewire(0.3, source)
        a, b = stored.connections(), masked.connections()
        assert torch.equal(a.places(), b.places())
        assert len(a) == 25
        assert torch.allclose(a.values, b.values, atol=1e-12)
    assert not torch.equal(a.places(), initial((7, 11), 25, generator(), DOUBLE).places())


@pytest.mark.parametrize("form", [StoredLayer, MaskedLayer])
def test_new_connections_have_no_momentum_and_old_ones_keep_theirs(form):
    layer = form(initial((7, 11), 30, generator(), DOUBLE))
    x, delta = batches(1)
    layer.update(delta, x, Descent(lr=0.1))

    def velocities() -> dict[int, float]:
        places = layer.connections().places()
        values = layer.velocity if form is StoredLayer else layer.velocity.view(-1)[places]
        return dict(zip(places.tolist(), values.tolist(), strict=True))

    weights = dict(
        zip(layer.connections().places().tolist(), layer.connections().values.tolist(), strict=True)
    )
    before = velocities()
    layer.rewire(0.4, generator(3))
    after = velocities()
    now = dict(
        zip(layer.connections().places().tolist(), layer.connections().values.tolist(), strict=True)
    )
    old = [p for p in now if weights.get(p) == now[p]]
    new = [p for p in now if p not in old]
    assert len(now) == 30
    assert 10 <= len(new) <= 14
    assert all(after[p] == 0 for p in new)
    assert all(after[p] == before[p] != 0 for p in old)
    if form is MaskedLayer:
        assert int((layer.weight != 0).sum()) == 30
        assert (layer.velocity[~layer.mask] == 0).all()


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("form", ["stored", "masked"])
def test_a_step_follows_the_gradient_of_the_loss(form, tanh):
    """Without momentum and decay, weights move by -lr times autograd's gradient."""
    net: Network = network(6, 9, 20, generator(), form, tanh, DOUBLE)
    source = generator(2)
    x = torch.randn(6, 10, generator=source, dtype=DOUBLE)
    target = torch.randn(6, 10, generator=source, dtype=DOUBLE)
    before = [layer.connections() for layer in (net.encoder, net.decoder)]
    dense = [m.dense().requires_grad_() for m in before]
    output = dense[1] @ torch.sigmoid(dense[0] @ x)
    output = output.tanh() if tanh else output
    wanted = (output - target).square().sum() / 20
    wanted.backward()
    plan = Plan(dropout=0.0, descent=Descent(lr=0.1, momentum=0.0, decay=0.0))
    assert net.step(x.clone(), target, plan, generator()) == pytest.approx(float(wanted.detach()))
    for layer, matrix, weight in zip((net.encoder, net.decoder), before, dense, strict=True):
        assert weight.grad is not None
        moved = (weight - 0.1 * weight.grad).detach().view(-1)[matrix.places()]
        assert torch.allclose(layer.connections().values, moved, atol=1e-12)


def test_dropout_silences_units_in_both_directions():
    net = network(6, 50, 200, generator(), dtype=DOUBLE)
    plan = Plan(dropout=0.5, descent=Descent(lr=0.1, momentum=0.0, decay=0.0))
    x = torch.randn(6, 1, generator=generator(1), dtype=DOUBLE)
    old = net.encoder.connections().dense()
    alive = torch.rand(50, 1, generator=generator(4)) >= 0.5
    net.step(x, x, plan, generator(4))
    changed = (net.encoder.connections().dense() != old).any(1)
    assert not changed[~alive[:, 0]].any()
    assert changed[alive[:, 0]].any()
