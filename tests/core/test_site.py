import torch
from torch import nn

from gossamer.core import Site


def site(**more: object) -> Site:
    values: dict[str, object] = {
        "name": "0", "role": "mlp.up", "block": 0, "module": "0", "parameter": "weight",
        "shape": (3, 2), **more,
    }  # fmt: skip
    return Site(**values)  # type: ignore[arg-type]


def test_a_view_writes_through():
    model = nn.Sequential(nn.Linear(2, 3))
    view = site().weight(model)
    view[1, 0] = 7.0
    assert model[0].weight[1, 0].item() == 7.0
    site().write(model, torch.zeros(3, 2, dtype=torch.float64))
    assert not model[0].weight.any()
    assert model[0].weight.dtype == torch.float32
    assert site().size == 6


def test_transposed_and_stacked_storage_look_the_same():
    model = nn.Sequential(nn.Module())
    stack = torch.arange(12.0).view(2, 2, 3)
    model[0].weight = nn.Parameter(stack.clone())
    seen = site(transposed=True, expert=1)
    assert torch.equal(seen.weight(model), stack[1].T)
    seen.write(model, torch.ones(3, 2))
    assert model[0].weight[1].eq(1).all()
    assert torch.equal(model[0].weight[0], stack[0])
