"""Embed: pooling by hand, padding and special tokens left out, the splice not seen."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.embeddings import embed, token_labels
from gossamer.methods.features.sae_embeddings import SAEEmbeddings
from gossamer.methods.features.source import ActivationSource
from gossamer.models import Tokens
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

HOOK = "model.layers.0"


@pytest.fixture(scope="module")
def fitted():
    model = tiny_model("llama")
    return model, SAEEmbeddings(hook=HOOK, k=4, width=32, tokens=1000).fit(model, random_tokens())


def padded():
    tokens = random_tokens(3)
    mask = torch.ones_like(tokens.input_ids, dtype=torch.bool)
    mask[1, 5:] = False
    return Tokens(tokens.input_ids, mask)


def by_hand(model, made, data, exclude):
    """Codes (T, M) of each document's tokens that count."""
    found = []
    for i in range(len(data)):
        one = Tokens(data.input_ids[i : i + 1], data.attention_mask[i : i + 1])
        rows = next(iter(ActivationSource(model, HOOK, one, sink_multiple=None).one_pass()))
        ids = data.input_ids[i][data.attention_mask[i]]
        kept = ~torch.isin(ids, torch.tensor(exclude))
        norm = made.metadata["sink_norm"]
        codes = made.encode(rows).to_dense() * (rows.norm(dim=1) <= norm)[:, None]
        found.append(codes[kept])
    return found


@pytest.mark.parametrize("pooling", ["max", "mean", "top"])
def test_pooling_by_hand(fitted, pooling):
    model, made = fitted
    data = padded()
    exclude = [int(data.input_ids[0, 0]), int(data.input_ids[2, 4])]
    expected = []
    for codes in by_hand(model, made, data, exclude):
        if pooling == "max":
            expected.append(codes.amax(0))
        elif pooling == "mean":
            expected.append(codes.sum(0) / (codes != 0).sum(0).clamp_min(1))
        else:
            quota = -(-len(codes) * 3 // 10)
            expected.append(codes.sort(0, descending=True).values[:quota].mean(0))
    found = embed(model, made, HOOK, data, pooling=pooling, share=0.3, exclude=exclude)
    torch.testing.assert_close(found.codes.to_dense(), torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert found.metadata["pooling"] == pooling


def test_labels_are_the_loudest_tokens(fitted):
    model, made = fitted
    data = random_tokens(3)
    words = [f"w{i}" for i in range(128)]
    labels = token_labels(model, made, HOOK, data, words, count=2)
    codes = torch.cat(by_hand(model, made, data, [999]))
    ids = data.input_ids.flatten()
    for latent, label in labels.items():
        sums = torch.zeros(128).index_add_(0, ids, codes[:, latent].abs())
        assert label.split()[0] == f"w{int(sums.argmax())}"


def test_an_embedding_model_reads_past_its_own_splice(fitted):
    model, _ = fitted
    with SAEEmbeddings(hook=HOOK, k=2, width=32, tokens=300).apply(model, random_tokens()) as at:
        spliced = model(input_ids=random_tokens(5).input_ids).logits
        found = at.embed(random_tokens(3), names=[f"d{i}" for i in range(6)])
        assert torch.equal(model(input_ids=random_tokens(5).input_ids).logits, spliced)
        assert "embed(" in str(at.report())
        made = at.dictionary
    plain = embed(model, made, HOOK, random_tokens(3))
    assert torch.equal(found.codes.to_dense(), plain.codes.to_dense())
    assert found.names[2] == "d2"


def test_impossible_settings_are_refused(fitted):
    with pytest.raises(GossamerError, match="pooling"):
        embed(*fitted, HOOK, random_tokens(), pooling="maxx")
    with pytest.raises(GossamerError, match="share"):
        SAEEmbeddings(share=0.0)
