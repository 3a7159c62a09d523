import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.packing import pack
from gossamer.methods.features.readers import GradientReader
from gossamer.methods.features.source import ActivationSource
from tests.models.tiny import tiny_model

PATH = "model.layers.0"


def ids(rows=3, length=10):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(0))


def by_hand(model, batch, real):
    """Hidden states of a block, and the gradient of the summed next-token loss by them."""
    kept = []

    def watch(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).requires_grad_()
        hidden.retain_grad()
        kept.append(hidden)

    handle = model.get_submodule(PATH).register_forward_hook(watch)
    logits = model(**batch).logits
    handle.remove()
    log = logits[:, :-1].log_softmax(-1)
    said = log.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    (-(said * real).sum()).backward()
    return kept[0].detach(), kept[0].grad


def test_activations_and_unit_gradients_beside_them():
    model = tiny_model("llama")
    batch = {"input_ids": ids()}
    reader = GradientReader(PATH)
    found = reader(model, batch)
    hidden, gradient = by_hand(model, batch, torch.ones(3, 9))
    assert found.shape == (3, 10, 64)
    assert reader.channels == 32
    torch.testing.assert_close(found[..., :32], hidden)
    unit = torch.nn.functional.normalize(gradient, dim=-1) * 32**0.5
    torch.testing.assert_close(found[:, :-1, 32:], unit[:, :-1], rtol=1e-4, atol=1e-4)
    # Nothing is predicted from the last token, and nothing comes after it.
    assert not bool(found[:, -1, 32:].any())
    assert not found.requires_grad


def test_padding_has_no_loss():
    model = tiny_model("llama")
    mask = torch.ones(3, 10, dtype=torch.int64)
    mask[0, 6:] = 0
    batch = {"input_ids": ids(), "attention_mask": mask}
    found = GradientReader(PATH)(model, batch)
    _, gradient = by_hand(model, batch, (mask[:, 1:] * mask[:, :-1]).float())
    unit = torch.nn.functional.normalize(gradient, dim=-1) * 32**0.5
    torch.testing.assert_close(found[0, :5, 32:], unit[0, :5], rtol=1e-4, atol=1e-4)
    assert not bool(found[0, 6:, 32:].any())


def test_documents_packed_apart_have_the_gradients_they_have_alone():
    model = tiny_model("llama")
    documents = [row.tolist() for row in ids(2, 7)]
    rows = []
    for packing in ("none", "varlen"):
        data = pack(documents, length=16, packing=packing)
        source = ActivationSource(
            model, PATH, data, reader=GradientReader(PATH), sink_multiple=None
        )
        rows.append(torch.cat(list(source.one_pass())))
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-3, atol=1e-3)


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    GradientReader(PATH)(model, {"input_ids": ids()})
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not sum(len(m._forward_hooks) for m in model.modules())


def test_a_model_that_predicts_nothing_is_refused():
    with pytest.raises(GossamerError, match="predicts no next token"):
        GradientReader("encoder.layer.0")(tiny_model("bert"), {"input_ids": ids()})
