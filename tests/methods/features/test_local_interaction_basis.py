import pytest
import torch

from gossamer.claims.base import Verdict
from gossamer.claims.features.local_interaction_basis import CLAIMS
from gossamer.core import GossamerError
from gossamer.methods.features.local_interaction_basis import LocalInteractionBasis
from gossamer.models import Tokens
from tests.models.tiny import tiny_model

TOKENS = Tokens.from_ids(torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(0)))
METHOD = LocalInteractionBasis(draws=2, sparsity=0.5)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS.input_ids[:2]).logits


def test_dropping_important_directions_costs_more_than_dropping_others():
    model = tiny_model("llama")
    dense, missed = logits(model), []
    basis = METHOD.bases(model, TOKENS)["model.layers.0"]
    for kept in (slice(0, 16), slice(16, 32)):

        def project(module, args, output, kept=kept):
            features = basis.features(output)[..., kept]
            return (features @ basis.back[kept] + basis.mean).float()

        handle = model.model.layers[0].register_forward_hook(project)
        missed.append(float((logits(model) - dense).norm()))
        handle.remove()
    with METHOD.apply(model, TOKENS):
        assert float((logits(model) - dense).norm()) == pytest.approx(missed[0], rel=1e-3)
    assert missed[0] < 0.7 * missed[1]


def test_reports_what_passes():
    with METHOD.apply(tiny_model("llama"), TOKENS) as applied:
        report = applied.report()
        (row,) = report.rows
        assert (row.name, row.block, row.size, row.sparsity) == ("model.layers.0", 0, 32, 0.5)
        assert "16 of 32 directions" in str(report)
        assert applied.method.hook == "model.layers.0"


def test_a_hook_that_nothing_follows_is_refused():
    model = tiny_model("llama")
    with pytest.raises(GossamerError, match="give a block that another follows"):
        LocalInteractionBasis(hook="model.layers.1").apply(model, TOKENS)
    with pytest.raises(GossamerError, match="did you mean"):
        LocalInteractionBasis(hook="model.layer.0").apply(model, TOKENS)


def test_claims_fail_for_figures_of_a_stub():
    digits, language = CLAIMS
    good = {"edges_lib": 100.0, "edges_pca": 1000.0, "invariance": 1e-9, "dense": 0.96}
    good |= {"accuracy_lib": 0.955, "accuracy_pca": 0.95}
    assert digits.check([good]) is Verdict.HOLDS
    assert digits.check([good | {"accuracy_pca": 0.96}]) is Verdict.WEAKER
    assert digits.check([good | {"invariance": 1e-3}]) is Verdict.FAILS
    assert digits.check([good | {"edges_lib": 1000.0}]) is Verdict.FAILS
    seen = {"edges_lib": 90.0, "edges_pca": 100.0, "edges_scaled": 110.0}
    assert language.check([seen]) is Verdict.HOLDS
    assert language.check([seen | {"edges_lib": 30.0}]) is Verdict.FAILS
