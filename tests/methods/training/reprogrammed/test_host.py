"""Host: the network sees what the adapter says, reads the last word, and is not changed."""

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.training.reprogrammed.adapters import ImagePrompt, LinearProbe
from gossamer.methods.training.reprogrammed.examples import Examples
from gossamer.methods.training.reprogrammed.host import Host, find_head, soft_prompt
from tests.models.tiny import tiny_model
from tests.models.vision import mobilenet


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 36, 7),
        nn.ReLU(),
        nn.Linear(7, 5),
    ).eval()


def one(values):
    return Examples(values, torch.zeros(1, dtype=torch.int64), ("0",))


def test_the_head_is_the_layer_that_gives_the_logits():
    assert find_head(net(), one({"x": torch.rand(1, 1, 6, 6)})) == "5"
    assert find_head(mobilenet(), one({"pixel_values": torch.rand(1, 3, 32, 32)})) == "classifier"
    assert find_head(tiny_model("gpt2"), one({"input_ids": torch.ones(1, 4).long()})) == "lm_head"
    ends = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Softmax(-1))
    with pytest.raises(GossamerError, match="ends in a linear head"):
        find_head(ends, one({"x": torch.rand(1, 1, 2, 2)}))


def test_images_pass_through_the_adapter_and_hooks_go():
    model = net()
    prompt = ImagePrompt(2, 6, 1, torch.zeros(1), torch.ones(1))
    prompt.labels.copy_(torch.tensor([3, 1]))
    images = torch.rand(4, 1, 8, 8)
    framed = prompt.enter("x", images)
    dense = model(framed)
    features = model[:5](framed)
    host = Host(model, "5", prompt)
    host.install()
    assert torch.equal(model(images), dense[:, [3, 1]])
    seen, logits = host.run({"x": images})
    assert torch.equal(seen, features)
    assert torch.equal(logits, dense)
    host.remove()
    assert torch.equal(model(framed), dense)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model[5]._forward_pre_hooks


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "mixtral"])
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_texts_behind_vectors_are_read_at_their_last_word(name, side):
    model = tiny_model(name)
    prompt = soft_prompt(model, 3, 4, seed=1)
    prompt.labels.copy_(torch.tensor([9, 2, 40]))
    ids = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 6).long()
    if side != "none":
        gone = slice(4, 6) if side == "right" else slice(0, 2)
        mask[1, gone] = 0
    embeds = model.get_input_embeddings()(ids)
    whole = torch.cat([prompt.vectors.expand(2, -1, -1), embeds], 1)
    long = torch.cat([torch.ones(2, 4).long(), mask], 1)
    with torch.no_grad():
        dense = model(inputs_embeds=whole, attention_mask=long).logits
        last = [9, 7] if side == "right" else [9, 9]
        want = torch.stack([dense[0, last[0]], dense[1, last[1]]])
        host = Host(model, "lm_head", prompt)
        host.install()
        given = {} if side == "none" else {"attention_mask": mask}
        output = model(input_ids=ids, labels=ids, **given)
        assert torch.allclose(output.logits, want[:, [9, 2, 40]], atol=1e-5)
        assert torch.allclose(model(ids, **given).logits, output.logits)
        host.remove()


def test_a_probe_of_a_text_reads_the_hidden_state_of_its_last_word():
    model = tiny_model("llama")
    probe = LinearProbe(32, 2)
    ids = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[:, -1]
        host = Host(model, "lm_head", probe)
        host.install()
        assert torch.allclose(model(input_ids=ids).logits, probe.linear(hidden), atol=1e-6)
        host.remove()


def test_a_reprogrammed_language_model_does_not_generate():
    model = tiny_model("llama")
    host = Host(model, "lm_head", LinearProbe(32, 2))
    host.install()
    with pytest.raises(GossamerError, match="does not generate"):
        model.generate(torch.ones(1, 4).long(), max_new_tokens=2)
    host.remove()


def test_a_network_without_logits():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, x):
            return [self.head(x)]

    with pytest.raises(GossamerError, match="gives a list without logits"):
        find_head(Odd(), one({"x": torch.rand(1, 2)}))
