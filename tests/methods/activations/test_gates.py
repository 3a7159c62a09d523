"""Gates on small arrays and single layers."""

import math

import pytest
import torch
from torch import nn

from gossamer.core import QuantileSketch, Site
from gossamer.methods.activations.gates import Gate, Gates, drop, input_taps
from gossamer.methods.activations.positions import Positions


def _site(name: str, role: str = "mlp.up", **values) -> Site:
    values = {"block": 0, "module": name, "parameter": "weight", "shape": (3, 4), **values}
    return Site(name=name, role=role, **values)


def _gate(cut: list[float], sparsity: float = 0.5, module: str = "0") -> Gate:
    return Gate(module, "mlp.up", 0, module, 12, sparsity, torch.tensor(cut))


def test_drop_removes_what_does_not_exceed_the_cut_and_keeps_faults() -> None:
    x = torch.tensor([0.5, -0.5, 0.51, -2.0, 0.0, math.nan, math.inf, -math.inf])
    assert drop(x, torch.tensor([0.5])).int().tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    largest = torch.tensor([torch.finfo(torch.float32).max])
    assert drop(x, largest).int().tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_drop_compares_in_float32_whatever_the_activation() -> None:
    # 1.001 rounds to 1 in bfloat16; the cut must not be rounded with it.
    x = torch.tensor([1.0], dtype=torch.bfloat16)
    assert drop(x, torch.tensor([1.001])).item()
    assert not drop(x, torch.tensor([0.999])).item()


def test_a_gate_removes_small_channels_outside_the_prefix() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    x = torch.tensor([[[0.1, -3.0, 0.2, 4.0], [0.1, -3.0, 0.2, 4.0], [9.0, 0.3, -0.4, 0.0]]])
    positions = Positions(dense_prefix=1)
    gates = Gates(model, positions)
    gates.set([_gate([0.35])])
    positions.begin(shape=(1, 3))
    with gates.counting() as counts:
        out = model(x)
    masked = torch.tensor([[[0.1, -3.0, 0.2, 4.0], [0, -3.0, 0, 4.0], [9.0, 0, -0.4, 0.0]]])
    gates.remove()
    assert torch.equal(out, model(masked))
    assert counts["0"].tolist() == [4, 8]


def test_per_channel_cuts() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    positions = Positions(dense_prefix=0)
    gates = Gates(model, positions)
    gates.set([_gate([0.0, 1.0, 10.0])])
    positions.begin(shape=(1, 1))
    x = torch.tensor([[[0.5, 0.5, 5.0]]])
    assert torch.equal(
        model(x), nn.functional.linear(torch.tensor([[[0.5, 0, 0]]]), model[0].weight)
    )
    gates.remove()


def test_setting_again_replaces_and_sparsity_zero_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    gates = Gates(model, Positions(dense_prefix=0))
    gates.set([_gate([1.0])])
    gates.set([_gate([2.0])])
    assert len(model[0]._forward_pre_hooks) == 1
    gates.set([_gate([0.0], sparsity=0.0)])
    assert not model[0]._forward_pre_hooks
    gates.set([_gate([1.0])])
    gates.remove()
    gates.remove()
    assert not model[0]._forward_pre_hooks


def test_taps_are_one_per_matrix_and_one_per_stack_of_experts() -> None:
    sites = [
        _site("q", "attention.q"),
        _site("router", "experts.router"),
        *(
            _site(f"e.down_proj[{e}]", "experts.down", module="e", parameter="down_proj", expert=e)
            for e in range(4)
        ),
    ]
    taps = input_taps(sites, ("attention.q", "experts.down"), active=0.5)
    assert [(t.name, t.size, len(t.sites)) for t in taps] == [("q", 12, 1), ("e.down_proj", 24, 4)]


def test_a_channel_weight_becomes_a_cut_per_channel() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 2, bias=False)
            self.lin.weight.data = torch.tensor([[3.0, 0.0, 0.0], [4.0, 1.0, 0.0]])

    site = _site("lin", shape=(2, 3))
    (tap,) = input_taps([site], ["mlp.up"])
    tap = tap.weighed(Model(), lambda site, w: torch.linalg.vector_norm(w, dim=0))
    sketch = QuantileSketch(3)
    sketch.update(torch.full((10, 3), 2.0))
    cut = tap.gate(0.5, sketch).cut
    assert cut[:2].tolist() == pytest.approx([2 / 5, 2.0], rel=2e-3)
    # The channel that feeds only zeros is removed, but a fault in it is not hidden.
    assert drop(torch.tensor([1e30, 1e30, 1e30]), cut).tolist() == [False, False, True]
    assert not drop(torch.tensor([0.0, 0.0, math.inf]), cut)[2]
