import torch

from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import record
from gossamer.methods.features.interp.firings import firings_of, pieces, speller
from gossamer.methods.features.rules import TopK
from gossamer.models import Tokens, load_model
from tests.models.tiny import tiny_model

HOOK = "model.layers.1"


def bed():
    ids = torch.randint(3, 100, (5, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    return tiny_model("llama"), Tokens(ids, mask), Dictionary.random(32, 48, TopK(4), seed=1).eval()


def dense(found):
    made = torch.zeros(*found.ids.shape, found.width)
    made[found.row, found.place, found.latent] = found.value
    return made


def test_firings_are_the_codes_of_real_tokens():
    model, tokens, made = bed()
    found = firings_of(model, tokens, HOOK, made, windows=2)
    batch = next(tokens.batches(5, "cpu"))
    rows = record(model, (HOOK,), batch)[HOOK].reshape(-1, 32)
    codes = made.encode(rows).to_dense().view(5, 10, 48) * tokens.attention_mask[:, :, None]
    assert torch.allclose(dense(found), codes, atol=1e-5)
    later = firings_of(model, tokens, HOOK, made, skip_first=True)
    assert not dense(later)[:, 0].any()
    assert torch.allclose(dense(later)[:, 1:], codes[:, 1:], atol=1e-5)


def test_sinks_are_left_out():
    model, tokens, made = bed()
    made.metadata["sink_norm"] = 0.0
    assert not len(firings_of(model, tokens, HOOK, made).row)


def test_pieces_hold_the_same_firings():
    model, tokens, made = bed()
    found = firings_of(model, tokens, HOOK, made)
    short = pieces(found, 4)
    assert short.ids.shape == (15, 4)
    assert torch.equal(dense(short).view(5, 12, 48)[:, :10], dense(found))
    assert not short.real.view(5, 12)[:, 10:].any()


def test_tokens_are_spelt_with_their_blanks():
    model, tokenizer = load_model("nano")
    say = speller(model)
    ids = tokenizer("Once upon a time, there was")["input_ids"]
    assert "".join(say(i) for i in ids[1:]).strip() in "Once upon a time, there was"
    assert any(say(i).startswith(" ") for i in ids[1:])
    assert speller(tiny_model("llama"))(7) == " t7"
