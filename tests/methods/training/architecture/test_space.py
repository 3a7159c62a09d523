"""Spaces: mixed operations, cells, and what is left when the choices are made."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.architecture.masked import SparseLinear
from gossamer.methods.training.architecture.space import (
    Cell,
    MixedOp,
    Zero,
    conv_space,
    decided,
    linear_space,
    mixed_ops,
)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_a_mixed_operation_is_the_softmax_of_its_operations():
    place = MixedOp({"two": lambda: Times(2.0), "half": lambda: Times(5.0), "none": Zero})
    x = torch.tensor([1.0, -3.0])
    assert torch.allclose(place(x), (2 + 5 + 0) / 3 * x)
    with torch.no_grad():
        place.alpha.copy_(torch.tensor([0.0, 1.0, 2.0]).log().nan_to_num(neginf=-1e9))
    assert torch.allclose(place(x), 5 / 3 * x)
    assert place.chances() == pytest.approx({"two": 0.0, "half": 1 / 3, "none": 2 / 3})
    # Doing nothing weighs most, and is no operation to keep.
    assert place.best() == "half"
    assert MixedOp({"none": Zero}).best() == "none"


def test_a_cell_adds_to_its_input_the_mean_of_its_nodes():
    cell = Cell({"twice": lambda: Times(2.0)}, nodes=2)
    # Nodes of x: 2x, and 2x + 2 (2x) = 6x; with the input x + (2x + 6x) / 2.
    assert cell(torch.ones(3)).tolist() == [5.0] * 3
    assert set(cell.edges) == {"0_1", "0_2", "1_2"}


@pytest.mark.parametrize(
    ("space", "shape"),
    [
        (linear_space(12, 3, width=8, cells=2), (4, 12)),
        (conv_space(2, 3, channels=4), (4, 2, 5, 5)),
    ],
)
def test_ready_spaces_give_logits_and_can_be_decided(space, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert space(x).shape == (4, 3)
    places = mixed_ops(space)
    net = decided(space, {name: list(place.choices)[1] for name, place in places.items()})
    assert net(x).shape == (4, 3)
    assert not any(isinstance(m, MixedOp) for m in net.modules())
    assert set(mixed_ops(space)) == set(places)
    assert not torch.equal(net[-1].weight, space[-1].weight)


def test_a_space_of_ones_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.ones(1))
            self.body = nn.ModuleList([MixedOp({"a": nn.Identity, "b": lambda: Times(3.0)})])

        def forward(self, x):
            return self.gate * self.body[0](x)

    net = Net()
    assert decided(net, {"body.0": "b"})(torch.ones(1)).item() == 3.0
    assert net(torch.ones(1)).item() == 2.0


def test_bad_spaces():
    with pytest.raises(GossamerError, match="nothing to choose"):
        MixedOp({})
    with pytest.raises(GossamerError, match="Linear holds nothing to search"):
        mixed_ops(nn.Linear(2, 2))
    with pytest.raises(GossamerError, match="nothing to search"):
        mixed_ops(MixedOp({"a": nn.Identity}))
    space = linear_space(4, 2, width=4, nodes=1)
    with pytest.raises(GossamerError, match=r"does not fit this space: 2.edges.0_1"):
        decided(space, {})
    with pytest.raises(GossamerError, match="operation of 2.edges.0_1 .*linea"):
        decided(space, {"2.edges.0_1": "linea"})
    with pytest.raises(GossamerError, match="operation 'idenity'"):
        linear_space(4, 2, ops="linear, idenity")


def test_only_some_operations():
    space = linear_space(4, 2, width=4, nodes=1, ops="linear, none")
    (place,) = mixed_ops(space).values()
    assert list(place.choices) == ["linear", "none"]
    assert isinstance(space[1], SparseLinear)
