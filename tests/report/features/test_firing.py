import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import TopK
from gossamer.report.features import collect, firing
from tests.report.features.made import HOOK, made


def test_codes_are_those_of_the_whole_forward_pass():
    all_, found = made(), made().book.firing
    back = torch.zeros_like(all_.codes)
    back[found.places.long(), found.latents()] = found.values
    assert torch.allclose(back, all_.codes, atol=1e-5)
    assert (back != 0).equal(all_.codes != 0)
    assert found.rows == 6 * 24 + 15
    assert found.counts.equal((all_.codes != 0).sum(0))
    for latent in (0, 5, 39):
        places, values = found.of(latent)
        assert places.tolist() == all_.codes[:, latent].nonzero()[:, 0].tolist()
        assert torch.allclose(values, all_.codes[places.long(), latent], atol=1e-5)


def test_sinks_have_no_code():
    model, dictionary, tokens, codes, _ = made()
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, output_hidden_states=True)
    norms = out.hidden_states[1].reshape(-1, 32).norm(dim=1)
    limit = float(norms.median())
    dictionary.metadata["sink_norm"] = limit
    try:
        found = collect(model, dictionary, (HOOK,), tokens)
    finally:
        del dictionary.metadata["sink_norm"]
    kept = (norms <= limit) & tokens.attention_mask.reshape(-1)
    assert found.rows == int(kept.sum())
    assert found.counts.equal((codes[kept] != 0).sum(0))


def test_a_dictionary_of_several_modules_reads_them_side_by_side():
    model, _, tokens, _, _ = made()
    wide = Dictionary.random(64, 20, TopK(2), seed=0).eval()
    paths = ("model.layers.0", "model.layers.1:in")
    found = collect(model, wide, paths, tokens)
    with torch.no_grad():
        hidden = model(input_ids=tokens.input_ids, output_hidden_states=True).hidden_states[1]
    rows = hidden.reshape(-1, 32)[tokens.attention_mask.reshape(-1)]
    expected = wide.encode(torch.cat([rows, rows], 1)).to_dense()
    assert found.counts.equal((expected != 0).sum(0))


def test_another_width_and_too_many_codes_are_one_line(monkeypatch):
    model, dictionary, tokens, _, _ = made()
    other = Dictionary.random(48, 50, TopK(2), seed=0)
    with pytest.raises(GossamerError, match=r"reads 48 channels; model.layers.0 has 32"):
        collect(model, other, (HOOK,), tokens)
    monkeypatch.setattr(firing, "MOST_CODES", 100)
    with pytest.raises(GossamerError, match="of at most 100; show fewer samples"):
        collect(model, dictionary, (HOOK,), tokens)
