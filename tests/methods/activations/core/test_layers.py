"""Gathered neurons compute what the masked layer computes, in every architecture's layout."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.activations.core.applied import blocks_between
from gossamer.methods.activations.core.layers import feedforwards, gather, output_norms
from gossamer.models import find_sites
from tests.models.tiny import tiny_model

F = torch.nn.functional


def _core(layer, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, layer.experts, layer.neurons, generator=generator) < 0.4


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "gpt_neox", "gemma2"])
def test_a_slice_holds_the_rows_and_columns_of_the_union(name: str) -> None:
    model = tiny_model(name)
    (layer,) = feedforwards(find_sites(model), [1])
    core = _core(layer, 2)
    slices = gather(model, layer, core)
    assert slices is not None
    (small,) = slices
    kept = core[:, 0].any(0).nonzero()[:, 0]
    writer = layer.writers[0]
    assert torch.equal(small.down, writer.weight(model)[:, kept])
    bias = getattr(writer.owner(model), "bias", None)
    assert (small.bias is None) == (bias is None)
    for site in layer.readers:
        weight, offset = small.readers[site.module]
        full = site.weight(model)
        parts = [full[: layer.neurons][kept], full[layer.neurons :]]
        expected = parts[0] if not len(parts[1]) else torch.cat([parts[0], parts[1][kept]])
        assert torch.equal(weight, expected)
        assert (offset is None) == (getattr(site.owner(model), "bias", None) is None)
    assert small.inside is not None
    assert torch.equal(small.inside.bool(), core[:, 0][:, kept])


def test_experts_are_gathered_one_by_one() -> None:
    model = tiny_model("mixtral")
    (layer,) = feedforwards(find_sites(model), [0])
    assert (layer.experts, layer.neurons, layer.stacked) == (4, 64, True)
    core = _core(layer, 1)
    slices = gather(model, layer, core)
    assert slices is not None
    stack = model.get_submodule(layer.name)
    x = torch.randn(5, 32)
    for e, small in enumerate(slices):
        inner = stack._apply_gate(F.linear(x, stack.gate_up_proj[e])) * core[0, e]
        expected = F.linear(inner, stack.down_proj[e])
        gated = stack._apply_gate(F.linear(x, *small.readers[layer.name]))
        torch.testing.assert_close(F.linear(gated, small.down), expected, rtol=1e-4, atol=1e-5)
        assert small.inside is None


def test_keeping_everything_gathers_nothing() -> None:
    model = tiny_model("llama")
    (layer,) = feedforwards(find_sites(model), [0])
    assert gather(model, layer, torch.ones(2, 1, layer.neurons, dtype=torch.bool)) is None
    half = torch.zeros(2, 1, layer.neurons, dtype=torch.bool)
    half[0, 0, ::2] = True
    half[1, 0, 1::2] = True
    # The union is everything, but the rows still differ.
    slices = gather(model, layer, half)
    assert slices is not None
    assert slices[0].inside is not None


def test_norms_are_those_of_the_columns() -> None:
    model = tiny_model("gpt2")
    (layer,) = feedforwards(find_sites(model), [0])
    weight = layer.writers[0].weight(model)
    assert torch.allclose(output_norms(model, layer)[0], weight.norm(dim=0))


def test_blocks_by_share_of_the_depth() -> None:
    assert blocks_between(32, (6 / 32, 27 / 32)) == tuple(range(6, 27))
    assert blocks_between(2, (6 / 32, 27 / 32)) == (1,)
    assert blocks_between(8, (0.0, 1.0)) == tuple(range(8))
    with pytest.raises(GossamerError, match="widen layers"):
        blocks_between(2, (0.6, 0.9))
