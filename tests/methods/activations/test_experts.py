"""Stacked experts: the masked loop is the stack's own arithmetic."""

import torch

from gossamer.methods.activations.experts import hook_down
from gossamer.methods.activations.positions import Positions
from tests.models.tiny import tiny_model


def _stack():
    torch.manual_seed(0)
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    hidden = torch.randn(10, 32)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    return experts, (hidden, index, torch.rand(10, 2))


def test_without_a_change_it_is_the_plain_stack() -> None:
    experts, inputs = _stack()
    positions = Positions(dense_prefix=0)
    positions.begin(shape=(2, 5))
    with torch.no_grad():
        plain = experts(*inputs)
        handle = hook_down(experts, lambda x, dense, counted: x, positions, lambda: False)
        ours = experts(*inputs)
        handle.remove()
    assert "forward" not in vars(experts)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_the_mask_meets_the_hidden_units_of_the_right_tokens() -> None:
    experts, inputs = _stack()
    positions = Positions(dense_prefix=1)
    positions.begin(shape=(2, 5))
    with torch.no_grad():
        plain = experts(*inputs)
        handle = hook_down(
            experts, lambda x, dense, counted: x.masked_fill(~dense, 0), positions, lambda: False
        )
        ours = experts(*inputs)
        handle.remove()
    dense = torch.tensor([0, 5])
    others = torch.tensor([1, 2, 3, 4, 6, 7, 8, 9])
    torch.testing.assert_close(ours[dense], plain[dense], rtol=1e-5, atol=1e-5)
    assert not ours[others].any()
