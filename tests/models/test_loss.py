"""Losses of windows add up to what evaluation reports, however they are batched."""

import math

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.evaluate import score
from gossamer.models import Inputs, Tokens
from gossamer.models.loss import WindowLosses, window_losses
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def padded(seed=3):
    tokens = random_tokens(seed)
    mask = tokens.attention_mask.clone()
    for row, length in enumerate((24, 7, 15, 2, 24, 1)):
        mask[row, length:] = False
    return Tokens(tokens.input_ids, mask)


@pytest.mark.parametrize("tokens", [random_tokens(3), padded()], ids=["full", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_mean_is_that_of_evaluation(tokens, name):
    model = tiny_model(name)
    losses = window_losses(model, tokens, batch_size=4)
    reference = score(model, tokens)
    assert losses.mean == pytest.approx(reference.loss, rel=1e-6)
    assert losses.count.sum() == reference.tokens


def test_every_window_stands_for_itself():
    model, tokens = tiny_model("llama"), padded()
    losses = window_losses(model, tokens, batch_size=5)
    assert losses.count.tolist() == [23, 6, 14, 1, 23, 0]
    assert losses.total[5] == 0
    for index in range(5):
        alone = score(model, tokens.slice(index, index + 1))
        assert float(losses.total[index]) == pytest.approx(alone.loss * alone.tokens, rel=1e-6)


def test_chunks_and_batches_change_rounding_only(monkeypatch):
    model, tokens = tiny_model("llama"), random_tokens(3)
    whole = window_losses(model, tokens)
    monkeypatch.setattr("gossamer.models.loss._CHUNK_BYTES", {"cpu": 4 * 128 * 5})
    chunked = window_losses(model, tokens, batch_size=1)
    assert torch.allclose(whole.total, chunked.total, rtol=1e-5)


def test_labelled_inputs_use_the_models_own_loss():
    model = tiny_model("vit")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(5, 3, 16, 16, generator=generator)
    labels = torch.tensor([0, 3, 1, 2, 2])
    losses = window_losses(model, Inputs({"pixel_values": pixels, "labels": labels}))
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(losses.total.float(), expected, atol=1e-5)
    assert losses.count.tolist() == [1.0] * 5


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(GossamerError, match="causal language model"):
        window_losses(tiny_model("bert"), random_tokens())
    with pytest.raises(GossamerError, match="at least two tokens"):
        window_losses(tiny_model("llama"), Tokens.from_ids(torch.ones(2, 1, dtype=torch.int64)))
    with pytest.raises(GossamerError, match="computes no loss"):
        window_losses(tiny_model("vit"), Inputs({"pixel_values": torch.zeros(1, 3, 16, 16)}))
    with pytest.raises(GossamerError, match="batch_size"):
        window_losses(tiny_model("llama"), random_tokens(), batch_size=0)


def test_modes_and_progress():
    model = tiny_model("llama").train()
    seen = []
    window_losses(model, random_tokens(), batch_size=4, progress=lambda *a: seen.append(a[:2]))
    assert seen == [(4, 6), (6, 6)]
    assert all(module.training for module in model.modules())


def test_a_broken_model_has_a_loss_that_is_no_number():
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(math.nan)
    assert math.isnan(window_losses(model, random_tokens()).mean)
    total = WindowLosses(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0]))
    assert total.mean == 1.0
