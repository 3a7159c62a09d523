"""Gradients of sites equal autograd's, and the model is left as it was."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.models import Tokens, find_sites, gradients
from tests.models.tiny import DECODERS, tiny_model


def text() -> Tokens:
    ids = torch.randint(3, 128, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, 6:] = False
    return Tokens(ids, mask)


@pytest.mark.parametrize("name", DECODERS)
def test_mean_and_mean_square_over_sequences(name: str) -> None:
    model, data = tiny_model(name), text()
    sites = find_sites(model)
    per_sequence: dict[str, list[torch.Tensor]] = {s.name: [] for s in sites.sites}
    for row in range(3):
        length = int(data.attention_mask[row].sum())
        ids = data.input_ids[row : row + 1, :length]
        model.zero_grad()
        logits = model(input_ids=ids).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
        for site in sites.sites:
            grad = site.owner(model).get_parameter(site.parameter).grad
            grad = grad if site.expert is None else grad[site.expert]
            per_sequence[site.name].append(grad.T if site.transposed else grad.clone())
    model.zero_grad()
    got = gradients(model, data, sites)
    assert set(got) == set(per_sequence)
    for site in sites.sites:
        stack = torch.stack(per_sequence[site.name])
        mean, square = got[site.name]
        assert mean.dtype == square.dtype == torch.float32
        assert tuple(mean.shape) == site.shape
        torch.testing.assert_close(mean, stack.mean(0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(square, stack.square().mean(0), rtol=1e-3, atol=1e-7)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    norm = model.model.norm.weight
    weight.grad = torch.ones_like(weight)
    norm.requires_grad_(False)
    model.train()

    class Stop(BaseException):
        pass

    class Data:
        def batches(self, size: int, device: object):
            yield from text().batches(size)
            raise Stop

    with pytest.raises(Stop):
        gradients(model, Data(), find_sites(model))  # pyright: ignore[reportArgumentType]
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not norm.requires_grad
    assert weight.requires_grad
    assert model.training
    assert model.model.layers[1].mlp.up_proj.weight.grad is None
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_model_without_a_loss() -> None:
    model = tiny_model("bert")
    with pytest.raises(GossamerError, match="BertModel computes no loss"):
        gradients(model, text(), find_sites(model))
