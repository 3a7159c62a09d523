import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.circuits.heads import (
    ablated,
    ablation_effects,
    head_count,
    head_inputs,
    head_outputs,
)
from tests.models.tiny import tiny_model

IDS = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_head_outputs_sum_to_what_attention_writes(name):
    model = tiny_model(name)
    outputs = head_outputs(model, {"input_ids": IDS})
    assert outputs.shape == (3, 2 * 4, 32)
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    seen = []
    for block in blocks:
        module = block.attn.c_proj if name == "gpt2" else block.self_attn.o_proj
        handle = module.register_forward_hook(lambda m, a, o: seen.append(o))
        logits(model)
        handle.remove()
        bias = 0 if module.bias is None else module.bias.detach()
        wanted = seen[-1][:, -1] - bias
        written = outputs[:, 4 * (len(seen) - 1) : 4 * len(seen)].sum(1)
        torch.testing.assert_close(written, wanted, rtol=1e-4, atol=1e-5)


def test_ablating_with_its_own_values_changes_nothing():
    model = tiny_model("llama")
    dense = logits(model)
    own = head_inputs(model, {"input_ids": IDS})
    every = torch.ones(2, 4, dtype=torch.bool)
    with ablated(model, every, own[:, 0]):
        torch.testing.assert_close(logits(model)[0], dense[0], rtol=1e-4, atol=1e-5)
    with ablated(model, every, torch.zeros(2, 4, 8)):
        assert not torch.allclose(logits(model), dense, atol=1e-3)
    assert torch.equal(logits(model), dense)


def test_only_the_named_heads_are_silenced():
    model = tiny_model("llama")
    heads = torch.zeros(2, 4, dtype=torch.bool)
    heads[1, 2] = True
    seen = []
    module = model.model.layers[1].self_attn.o_proj
    before = head_inputs(model, {"input_ids": IDS})[1]
    with ablated(model, heads, torch.full((2, 4, 8), 7.0)):
        handle = module.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        logits(model)
        handle.remove()
    after = seen[0].unflatten(-1, (4, 8))
    assert (after[:, :, 2] == 7).all()
    others = [0, 1, 3]
    torch.testing.assert_close(after[:, :, others], before[:, :, others])


def test_a_head_that_writes_nothing_is_worth_nothing():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0
    right = torch.zeros(3, 128, dtype=torch.bool)
    right[:, 5:9] = True
    effects = ablation_effects(model, IDS, IDS.flip(1), right)
    assert effects.shape == (2, 4)
    assert effects[1, 1] == 0
    assert (effects != 0).sum() == 7


def test_a_model_without_heads_is_refused():
    with pytest.raises(GossamerError, match="names no num_attention_heads"):
        head_count(torch.nn.Linear(2, 2))
