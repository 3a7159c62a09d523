"""Removing units equals a smaller network: chains, convolutions, MLPs and experts."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.search.units import (
    Side,
    UnitLayer,
    kept_units,
    unit_layers,
    units_of,
    weights_kept,
)
from gossamer.methods.training.sparsifier.layers import find_layers
from tests.models.tiny import tiny_model


def found(model, skip=""):
    return {layer.name: layer for layer in unit_layers(model, find_layers(model, skip))}


def chain(*widths):
    layers = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_places_of_units():
    kept = torch.tensor([True, False, True])
    assert Side("h", 3).of(kept, 3).tolist() == [True, False, True]
    # A packed gate and up: the units come twice.
    assert Side("h", 3).of(kept, 6).tolist() == [True, False, True] * 2
    # A flattened channel, or a gate beside its up: neighbours.
    assert Side("h", 3, 2).of(kept, 6).tolist() == [True, True, False, False, True, True]


def test_worked_chain():
    layers = found(chain(2, 3, 4, 1))
    assert units_of(layers.values()) == {"0": 3, "2": 4}
    kept = {"0": torch.tensor([1, 0, 1]).bool(), "2": torch.tensor([0, 1, 1, 0]).bool()}
    assert layers["0"].mask(kept).int().tolist() == [[1, 1], [0, 0], [1, 1]]
    assert layers["2"].mask(kept).int().tolist() == [[0, 0, 0], [1, 0, 1], [1, 0, 1], [0, 0, 0]]
    assert layers["4"].mask(kept).int().tolist() == [[0, 1, 1, 0]]
    counts = {"0": 2, "2": 2}
    for layer in layers.values():
        assert layer.weights(counts) == int(layer.mask(kept).sum())
    assert weights_kept(list(layers.values()), counts) == 4 + 4 + 2


@given(
    st.lists(st.integers(1, 40), min_size=3, max_size=6),
    st.floats(0.0, 0.99),
)
def test_the_nearest_count_with_one_share_for_all(widths, sparsity):
    layers = [
        UnitLayer(str(i), "linear", 0, f"{i}.weight", (o, n), rows=None, columns=None)
        for i, (n, o) in enumerate(pairwise(widths))
    ]
    last = len(layers) - 1
    layers = [
        UnitLayer(
            layer.name,
            "linear",
            0,
            layer.parameter,
            layer.shape,
            rows=None if i == last else Side(str(i), layer.shape[0]),
            columns=None if i == 0 else Side(str(i - 1), layer.shape[1]),
        )
        for i, layer in enumerate(layers)
    ]
    kept = kept_units(layers, sparsity)
    sizes = units_of(layers)
    wanted = (1 - sparsity) * sum(layer.size for layer in layers)
    off = abs(weights_kept(layers, kept) - wanted)
    assert all(1 <= kept[name] <= sizes[name] for name in sizes)
    # No share of a fine grid comes nearer.
    for step in range(401):
        other = {name: max(1, round(step / 400 * units)) for name, units in sizes.items()}
        assert off <= abs(weights_kept(layers, other) - wanted) + 1e-6


def drop(model, layers, seed=0, share=0.5):
    """Zero the masks' weights; which units of every hidden layer stayed."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, units in units_of(layers.values()).items():
        order = torch.randperm(units, generator=generator)
        kept[name] = torch.zeros(units).bool().index_fill(0, order[: round(share * units)], True)
    with torch.no_grad():
        for layer in layers.values():
            layer.view(model.get_parameter(layer.parameter)).mul_(layer.mask(kept))
    return kept


def test_convolutions_a_depthwise_one_and_a_flattened_one():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Sequential(nn.Conv2d(6, 4, 1), nn.GELU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.Dropout(),
        nn.Linear(5, 3),
    ).eval()
    layers = found(net)
    assert list(layers) == ["0", "3", "4.0", "6", "8"]
    assert units_of(layers.values()) == {"0": 6, "4.0": 4, "6": 5}
    assert layers["3"].columns is None
    assert layers["6"].columns == Side("4.0", 4, 4)
    kept = drop(net, layers)
    # A removed channel and a removed unit have no influence, whatever their biases are.
    x = torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        before = net(x)
        for name in ("0", "3", "4.0", "6"):
            side = layers[name].rows
            net.get_submodule(name).bias[~kept[side.hidden]] = 100.0
    assert torch.equal(net(x), before)
    with torch.no_grad():
        net[0].bias[kept["0"]] += 1.0
    assert not torch.allclose(net(x), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "mixtral", "qwen3_moe"])
def test_inner_neurons_that_are_gone_cannot_be_woken(name):
    model = tiny_model(name)
    layers = found(model)
    assert {layer.role.partition(".")[0] for layer in layers.values()} <= {"mlp", "experts"}
    kept = drop(model, layers)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for layer in layers.values():
            if layer.columns is None:
                continue
            # Whatever the next matrix makes of a removed neuron, it is multiplied by zero.
            gone = ~layer.columns.of(kept[layer.columns.hidden], layer.shape[1])
            layer.view(model.get_parameter(layer.parameter))[:, gone] = 50.0
    bias = any("fc1.bias" in n or "c_fc.bias" in n for n, _ in model.named_parameters())
    if not bias:
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    assert sum(m.mask(kept).sum() for m in layers.values()) == weights_kept(
        list(layers.values()), {n: int(k.sum()) for n, k in kept.items()}
    )


def test_a_gate_that_takes_its_rows_alternately():
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
    )
    layers = found(GptOssForCausalLM(config))
    sides = {layer.role: layer.rows or layer.columns for layer in layers.values()}
    assert sides["experts.gate_up"].each == 2
    assert sides["experts.down"].each == 1


def test_a_hidden_layer_with_a_dense_neighbour_stays_whole():
    layers = found(chain(2, 3, 4, 1), skip="4")
    assert units_of(layers.values()) == {"0": 3}
    assert layers["2"].rows is None


@pytest.mark.parametrize(
    ("net", "what"),
    [
        (nn.Linear(4, 4), "no hidden units"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "1 .LayerNorm. may mix"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)), "1 has 2 groups"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(8, 2)), "reads 8 values of 4 units"),
        (nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(8, 2)), "reads 8 values of 4"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 2)), "Softmax"),
        (nn.Sequential(nn.Bilinear(2, 2, 2), nn.Linear(2, 2)), "Bilinear"),
        (nn.TransformerDecoderLayer(8, 2, 8), "cannot be told"),
    ],
)
def test_what_mixes_units_is_refused(net, what):
    with pytest.raises(GossamerError, match=what) as error:
        unit_layers(net, find_layers(net))
    assert "space=weight" in str(error.value)


def test_a_layer_that_runs_twice_is_refused():
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(GossamerError, match="runs twice"):
        unit_layers(net, find_layers(net))
