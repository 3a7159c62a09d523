"""Moving masks: what is dropped, what grows, and that the optimizer forgets."""

import pytest
import torch

from gossamer.methods.weights.structured.isoflop import MaskedLinear, SparseParallel
from gossamer.methods.weights.structured.rigl import MaskUpdater


def layer_with(weight, mask):
    layer = MaskedLinear(weight.shape[1], weight.shape[0], False, kept=1)
    with torch.no_grad():
        layer.weight_mask.copy_(mask)
        layer.weight.copy_(weight * mask)
    return layer


def test_smallest_weights_make_room_for_steepest_gradients():
    weight = torch.tensor([[4.0, 1.0, 0.0, 0.0], [3.0, 2.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    layer = layer_with(weight, mask)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    updater = MaskUpdater(layer, optimizer, total=1000, drop=0.5, every=1)
    # One step fills the optimizer's state.
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = layer.weight.detach().clone()
    assert updater.begin(1)
    slope = torch.tensor([[0.0, 0.1, 9.0, 0.2], [0.0, 0.1, 0.3, 8.0]])
    (layer.live("weight") * slope).sum().backward()
    assert torch.equal(layer.weight.grad, slope)
    assert updater.step()
    expected = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(layer.weight_mask, expected)
    stays = mask & expected
    assert torch.equal(layer.weight.detach(), kept * stays)
    for moment in ("exp_avg", "exp_avg_sq"):
        value = optimizer.state[layer.weight][moment]
        assert value[stays].all()
        assert not value[~stays].any()


def test_a_dropped_weight_may_grow_again_from_zero():
    weight = torch.tensor([[4.0, 1.0, 0.0, 0.0]])
    layer = layer_with(weight, torch.tensor([[True, True, False, False]]))
    updater = MaskUpdater(
        layer, torch.optim.SGD(layer.parameters(), 0.1), total=1000, drop=0.5, every=1
    )
    updater.begin(1)
    (layer.live("weight") * torch.tensor([[0.0, 5.0, 1.0, 1.0]])).sum().backward()
    updater.step()
    assert layer.weight_mask.tolist() == [[True, True, False, False]]
    assert layer.weight.tolist() == [[4.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", ["linear", "stack"])
def test_counts_never_change_and_masked_weights_stay_zero(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "linear":
        layer = MaskedLinear(20, 15, kept=77, generator=generator)
    else:
        layer = SparseParallel(20, 15, sparsity=0.75, generator=generator)
    ((weight, mask),) = layer.pairs()
    before, count = mask.clone(), int(mask.sum())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    updater = MaskUpdater(layer, optimizer, total=40, every=5)
    moved = 0
    for step in range(40):
        updater.begin(step)
        layer(torch.randn(8, 20, generator=generator)).square().mean().backward()
        if updater.step():
            moved += 1
        else:
            optimizer.step()
        optimizer.zero_grad()
        assert int(mask.sum()) == count
        assert not weight.detach()[~mask].any()
    # At steps 5, 10, ... up to three quarters of 40; at the end nothing is left to move.
    assert moved == 5
    assert not torch.equal(mask, before)


def test_when_masks_move():
    layer = MaskedLinear(4, 4, kept=4)
    updater = MaskUpdater(layer, torch.optim.SGD(layer.parameters(), 0.1), total=100, every=10)
    due = [step for step in range(100) if updater.begin(step)]
    assert due == [10, 20, 30, 40, 50, 60, 70]
    assert not updater.begin(11)
    assert not layer.dense_gradient
    assert not updater.step()


def test_a_full_mask_has_nothing_to_grow():
    layer = MaskedLinear(4, 3, kept=12)
    updater = MaskUpdater(layer, torch.optim.SGD(layer.parameters(), 0.1), total=100, every=1)
    updater.begin(1)
    layer(torch.ones(1, 4)).sum().backward()
    before = layer.weight.detach().clone()
    assert updater.step()
    assert layer.weight_mask.all()
    assert torch.equal(layer.weight, before)
