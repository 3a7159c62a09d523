"""AdamS and its kin: Adam where nothing pulls, the pull's sign, what the moments remember."""

import pytest
import torch

from gossamer.methods.training.nm.adam import Decay, adam_step

MASK = torch.tensor([[True, False, True, False]])


def group(**values):
    return {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, **values}


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_without_a_pull_it_is_torchs_adam(kind):
    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    ours, state = theirs.detach().clone(), {}
    optimizer = kind([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        gradient = torch.randn(3, 4, dtype=torch.float64)
        theirs.grad = gradient.clone()
        optimizer.step()
        adam_step(ours, gradient, state, dict(optimizer.param_groups[0]))
    assert torch.allclose(ours, theirs.detach(), atol=1e-12)
    assert torch.allclose(state["exp_avg_sq"], optimizer.state[theirs]["exp_avg_sq"])


def test_one_update_of_adams_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]], dtype=torch.float64)
    gradient = torch.tensor([[0.1, 0.2, -0.3, 0.0]], dtype=torch.float64)
    state = {}
    decay = Decay(0.05, into="moment", toward="sign", keep=0.25)
    before = weight.clone()
    adam_step(weight, gradient, state, group(), mask=MASK, decay=decay)
    mean = 0.1 * gradient
    moved = torch.stack([mean[0, 0], 0.25 * mean[0, 1] - 0.05, mean[0, 2], mean[0, 3] + 0.05])
    square = 0.05 * moved**2
    want = before - 0.01 * (moved / 0.1) / ((square / 0.05).sqrt() + 1e-8)
    assert torch.allclose(weight, want)
    # The first moment is the loss's alone, the second that of what moved.
    assert torch.allclose(state["exp_avg"], mean)
    assert torch.allclose(state["exp_avg_sq"], square.unsqueeze(0))


@pytest.mark.parametrize("toward", ["weight", "sign"])
def test_a_pull_shrinks_removed_weights_and_leaves_kept_ones(toward):
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    before, state = weight.clone(), {}
    decay = Decay(0.1, into="moment", toward=toward)
    for _ in range(10):
        adam_step(weight, torch.zeros(1, 4), state, group(), mask=MASK, decay=decay)
    assert torch.equal(weight[MASK], before[MASK])
    assert (weight[~MASK].abs() < before[~MASK].abs() - 0.05).all()
    assert torch.equal(weight.sign(), before.sign())


def test_the_pull_is_zero_on_kept_weights():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    assert Decay(0.5).term(weight, MASK).tolist() == [[0.0, -1.0, 0.0, 2.0]]
    assert Decay(0.5, toward="sign").term(weight, MASK).tolist() == [[0.0, -0.5, 0.0, 0.5]]
