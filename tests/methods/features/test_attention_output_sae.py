import pytest
import torch

from gossamer.claims.base import Verdict
from gossamer.claims.features.attention_output_sae import CLAIMS
from gossamer.core import GossamerError
from gossamer.methods.features.attention_output_sae import AttentionOutputSAE
from gossamer.methods.features.attribution.direct import constants
from gossamer.methods.features.hooks import record
from gossamer.methods.features.splicing import Splice, loss_recovered
from gossamer.models import Tokens
from tests.models.tiny import tiny_model

TOKENS = Tokens.from_ids(torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0)))
PATH = "model.layers.1.self_attn.o_proj:in"
METHOD = AttentionOutputSAE(
    width=64, tokens=1024, batch_size=64, lr=5e-3, sink_multiple=None, coefficient=0.5
)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS.input_ids[:2]).logits


def test_reconstructs_what_the_heads_hand_over():
    model = tiny_model("llama")
    dense = record(model, (PATH,), {"input_ids": TOKENS.input_ids})[PATH]
    module = model.model.layers[1].self_attn.o_proj
    with METHOD.apply(model, TOKENS) as applied:
        seen = []
        handle = module.register_forward_hook(lambda m, a, o: seen.append(a[0]))
        with torch.no_grad():
            model(input_ids=TOKENS.input_ids)
        handle.remove()
        assert applied.hook == PATH
        assert applied.block == 1
        wanted = applied.dictionary(dense)
        torch.testing.assert_close(seen[0], wanted, rtol=1e-4, atol=1e-5)
        assert "latents by the head that holds most" in str(applied.report())


def test_attributes_the_unspliced_model():
    model = tiny_model("llama")
    with METHOD.apply(model, TOKENS) as applied:
        inputs = {"input_ids": TOKENS.input_ids}
        found = applied.attribute(inputs, [3, 60], [0, 7], [5, 15])
        spliced = logits(model)
    dense = record(model, (PATH,), inputs)[PATH]
    made = applied.dictionary
    for n, (latent, row, at) in enumerate(((3, 0, 5), (60, 7, 15))):
        wanted = made.pre_activations(dense[row, [at]])[0, latent] - constants(made)[latent]
        torch.testing.assert_close(found.by_source[n].sum(), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(spliced, logits(model))


def test_inputs_are_spliced_and_ablated():
    model = tiny_model("llama")
    made = METHOD.fit(model, TOKENS)
    dense = logits(model)
    with Splice(model, PATH, made, keep_error=True) as splice:
        assert torch.equal(logits(model), dense)
        splice.keep_error = False
        changed = logits(model)
        assert not torch.allclose(changed, dense)
        with splice.paused():
            assert torch.equal(logits(model), dense)
        assert torch.equal(logits(model), changed)
    assert torch.equal(logits(model), dense)
    loss = loss_recovered(model, TOKENS, made, PATH)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    silent = loss_recovered(model, TOKENS, made, PATH)
    assert loss.ablated == pytest.approx(silent.clean)


def test_a_hook_behind_the_projection_is_refused():
    with pytest.raises(GossamerError, match="behind the output projection the heads are mixed"):
        AttentionOutputSAE(hook="model.layers.1.self_attn.o_proj")


def test_claims_fail_for_figures_of_a_stub():
    exact, lookup, induction = CLAIMS
    good = {"worst": 1e-9, "forgotten": 0.5, "asked": 200.0}
    assert exact.check([good]) is Verdict.HOLDS
    assert exact.check([good | {"worst": 1e-3}]) is Verdict.FAILS
    assert exact.check([good | {"forgotten": 0.0}]) is Verdict.FAILS
    for claim in (lookup, induction):
        good = {"share_top": 0.8, "share_random": 0.0}
        assert claim.check([good]) is Verdict.HOLDS
        assert claim.check([good | {"share_top": 0.4}]) is Verdict.WEAKER
        assert claim.check([good | {"share_random": 0.75}]) is Verdict.FAILS
        assert claim.check([{"share_top": 0.1, "share_random": 0.0}]) is Verdict.FAILS
