import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.attribution.view import eager, tolerance, views
from tests.models.tiny import DECODERS, tiny_model

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("architecture", DECODERS)
def test_maps_times_values_are_what_the_heads_hand_over(architecture):
    model = tiny_model(architecture)
    before = model.config._attn_implementation
    seen = views(model, {"input_ids": IDS}, (0, 1))
    assert model.config._attn_implementation == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    for block, view in seen.items():
        assert view.block == block
        values = view.values.repeat_interleave(view.group, 1)
        made = torch.einsum("bhts,bhse->bthe", view.maps, values)
        torch.testing.assert_close(made, view.mixed, rtol=1e-4, atol=1e-5)
        assert torch.equal(view.maps.triu(1), torch.zeros_like(view.maps))
        again = torch.einsum("bsd,ged->bgse", view.read, view.weight) + view.bias[:, None]
        torch.testing.assert_close(again, view.values, rtol=1e-4, atol=1e-5)


def test_the_norm_between_stream_and_values_is_found():
    view = views(tiny_model("llama"), {"input_ids": IDS}, (1,))[1]
    assert view.norm == "model.layers.1.input_layernorm"
    assert views(tiny_model("gpt2"), {"input_ids": IDS}, (0,))[0].norm == "transformer.h.0.ln_1"


def test_the_implementation_comes_back_after_an_error():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), eager(model):
        assert model.config._attn_implementation == "eager"
        raise RuntimeError
    assert model.config._attn_implementation == before


def test_blocks_that_are_not_there_are_refused():
    with pytest.raises(GossamerError, match="block is 2; the model has 0 to 1"):
        views(tiny_model("llama"), {"input_ids": IDS}, (2,))


def test_attention_that_is_no_weighted_sum_of_values_is_refused():
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with pytest.raises(GossamerError, match="is not their maps times their values; Llama"):
        views(model, {"input_ids": IDS}, (1,))
    handle.remove()


def test_half_precision_is_allowed_more_rounding():
    assert tolerance(torch.float32) < tolerance(torch.bfloat16)
