"""What is heard of a layer is what goes into it and what comes out, experts included."""

import pytest
import torch
from torch import nn

from gossamer.methods.training.modular.activity import _through, listen
from gossamer.methods.training.sparsifier.layers import Layer, find_layers
from tests.models.tiny import tiny_model


@pytest.mark.parametrize("transposed", [False, True])
def test_an_experts_matrix_is_used_as_it_is_stored(transposed):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 5)
    module = nn.Module()
    module.down_proj = nn.Parameter(weight.transpose(1, 2) if transposed else weight)
    module.down_proj_bias = nn.Parameter(bias)
    layer = Layer("1", "experts.down", 0, "experts.down_proj", (5, 4), transposed, 1)
    rows = torch.randn(6, 4, generator=generator)
    assert torch.allclose(_through(module, layer, rows), rows @ weight[1].T + bias[1], atol=1e-6)


def test_experts_are_heard_on_their_own_tokens():
    model = tiny_model("mixtral")
    layers = tuple(layer for layer in find_layers(model) if layer.block == 0 and layer.expert == 1)
    heard, calls = {}, {}

    def noted(name, before, behind):
        heard[name] = before, behind

    handles = listen(model, layers, lambda: True, noted)
    experts = model.get_submodule(layers[0].parameter.rpartition(".")[0])
    handles.append(experts.register_forward_hook(lambda m, args, out: calls.update(args=args)))
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert set(heard) == {layer.name for layer in layers}
    hidden, index = calls["args"][0].detach().reshape(24, -1), calls["args"][1].reshape(24, -1)
    own = hidden[(index == 1).any(1)]
    gate, up = (own @ experts.gate_up_proj[1].T).chunk(2, -1)
    units = experts.act_fn(gate) * up
    for layer in layers:
        expected = (own, torch.cat([gate, up], -1))
        if layer.role == "experts.down":
            expected = (units, units @ experts.down_proj[1].T)
        for found, right in zip(heard[layer.name], expected, strict=True):
            assert torch.allclose(found, right, atol=1e-5)
