import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.features.attribution.direct import direct, readers
from gossamer.methods.features.attribution.stream import FrozenNorm, components, split_source
from gossamer.methods.features.attribution.view import views
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import record
from gossamer.methods.features.rules import TopK
from tests.methods.features.attribution.test_direct import IDS, dictionary
from tests.models.tiny import tiny_model


@pytest.mark.parametrize("width", [6, 7])
def test_a_frozen_layer_norm_is_the_norm_where_it_was_frozen(width):
    norm = nn.LayerNorm(width)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    x = torch.randn(width, generator=generator)
    frozen = FrozenNorm.at(norm, x, norm(x).detach())
    assert frozen.centred
    torch.testing.assert_close(frozen(x).float(), norm(x).detach(), rtol=1e-4, atol=1e-5)
    # Linear: twice the input gives twice the output but for the bias.
    torch.testing.assert_close(frozen(2 * x) - frozen.bias, 2 * (frozen(x) - frozen.bias))


def test_a_norm_of_another_kind_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return torch.tanh(x) * self.weight + x**2

    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(GossamerError, match="Odd is no layer norm"):
        FrozenNorm.at(Odd(), x, Odd()(x[None])[0].detach())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "qwen2"])
def test_a_source_splits_exactly_over_stream_latents(name):
    model = tiny_model(name)
    view = views(model, {"input_ids": IDS}, (1,))[1]
    heads = view.maps.shape[1]
    made = dictionary(view.mixed.shape[2] * view.mixed.shape[3])
    stream = Dictionary.random(32, 48, TopK(5), seed=4).eval().requires_grad_(False)
    one = torch.tensor([7])
    found = direct(view, made, one, torch.tensor([1]), torch.tensor([6]))
    split = split_source(model, view, readers(made, one, heads)[0], stream, row=1, at=6, source=3)
    assert len(split.latents) == 5
    assert split.total == pytest.approx(float(found.by_source[0, 3]), rel=1e-3, abs=1e-5)
    summed = float(split.parts.sum()) + split.atoms_bias + split.error + split.biases
    assert summed == pytest.approx(split.total, rel=1e-3, abs=1e-5)


def test_a_perfect_dictionary_leaves_no_error():
    model = tiny_model("llama")
    view = views(model, {"input_ids": IDS}, (1,))[1]
    stream = Dictionary(32, 1, TopK(1)).eval().requires_grad_(False)
    stream.W_enc[:, 0] = stream.W_dec[0] = torch.nn.functional.normalize(view.stream[0, 2], dim=0)
    reading = readers(dictionary(32), torch.tensor([7]), 4)[0]
    split = split_source(model, view, reading, stream, row=0, at=5, source=2)
    assert split.parts.tolist() == pytest.approx([split.total], rel=1e-3)
    assert abs(split.error) < 1e-4 * abs(split.total)


def test_components_sum_to_the_stream():
    model = tiny_model("gpt2")
    parts = components(model, {"input_ids": IDS}, 1)
    assert list(parts) == ["embedding", "attention 0", "mlp 0"]
    stream = record(model, ("transformer.h.1:in",), {"input_ids": IDS})["transformer.h.1:in"]
    torch.testing.assert_close(sum(parts.values()), stream, rtol=1e-4, atol=1e-4)
    with pytest.raises(GossamerError, match="do not sum to what enters block 1"):
        components(tiny_model("gemma2"), {"input_ids": IDS}, 1)


def test_a_dictionary_of_another_width_is_refused():
    model = tiny_model("llama")
    view = views(model, {"input_ids": IDS}, (1,))[1]
    reading = readers(dictionary(32), torch.tensor([7]), 4)[0]
    with pytest.raises(GossamerError, match="the stream has 32 channels"):
        split_source(model, view, reading, dictionary(8), row=0, at=5, source=2)
