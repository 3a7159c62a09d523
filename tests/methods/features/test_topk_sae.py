import dataclasses

import pytest
import torch

from gossamer.claims.base import Verdict
from gossamer.claims.features.topk_sae import CLAIMS
from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.topk_sae import TopKSAE
from gossamer.methods.features.training import Trainer
from gossamer.models import Tokens
from tests.models.tiny import tiny_model


def tokens(windows=8, length=32):
    generator = torch.Generator().manual_seed(0)
    return Tokens.from_ids(torch.randint(3, 128, (windows, length), generator=generator))


@torch.no_grad()
def out(model):
    return model(input_ids=tokens().input_ids[:2])[0]


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


METHOD = TopKSAE(k=4, width=64, tokens=4096, batch_size=128, lr=5e-3)


def test_fit_gives_a_dictionary_of_the_middle_block_and_leaves_the_model_alone():
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    made = METHOD.fit(model, tokens(), progress=lambda done, total, what: seen.append(done))
    assert (made.d_in, made.d_sae, made.rule.k) == (32, 64, 4)
    assert made.metadata["hook_name"] == "model.layers.1"
    assert made.metadata["context_size"] == 32
    assert made.metadata["method"]["k"] == 4
    assert seen == list(range(1, 33))
    assert not any(p.requires_grad for p in made.parameters())
    assert hooks_of(model) == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_training_lowers_the_error():
    model = tiny_model("llama")
    short = dataclasses.replace(METHOD, tokens=128).apply(model, tokens()).score
    with dataclasses.replace(METHOD, hook="model.layers.0").apply(model, tokens()):
        pass
    model = tiny_model("llama")
    long = dataclasses.replace(METHOD, tokens=16384).apply(model, tokens()).score
    assert long.fvu < 0.8 * short.fvu
    assert long.l0 <= 4


def test_reports_what_it_achieved():
    with METHOD.apply(tiny_model("gpt2"), tokens()) as applied:
        report = applied.report()
        (row,) = report.rows
        assert (row.name, row.block, row.size) == ("transformer.h.1", 1, 64)
        assert row.sparsity == pytest.approx(1 - applied.score.l0 / 64)
        assert 1 - 4 / 64 <= report.sparsity < 1
        assert report.unit == "latents"
        assert report.simulated
        text = str(report)
        assert "of k = 4" in text
        assert "FVU" in text
        assert "dead" in text
        assert applied.method.hook == "transformer.h.1"
        assert applied.method.lr == 5e-3


def test_open_values_are_resolved_from_the_data():
    applied = TopKSAE(k=4).apply(tiny_model("llama"), tokens())
    method = applied.method
    assert method.width == 8 * 32
    assert method.batch_size == 8 * 32
    assert method.tokens == 16 * 8 * 32
    assert method.lr == pytest.approx(2e-4 * 8)


def test_state_attaches_the_same_dictionary_again():
    model = tiny_model("bert")
    applied = METHOD.apply(model, tokens())
    wanted, state = out(model), applied.state()
    applied.restore()
    dense = out(model)
    again = METHOD.reattach(model, state.meta, state.tensors)
    assert torch.equal(out(model), wanted)
    assert not torch.allclose(wanted, dense)
    assert str(again.report()).splitlines()[1:] == str(applied.report()).splitlines()[1:]
    again.restore()
    assert torch.equal(out(model), dense)


def test_keeping_the_error_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    dense = out(model)
    with METHOD.apply(model, tokens(), keep_error=True) as applied:
        assert torch.equal(out(model), dense)
        assert "error kept" in str(applied.report())


def test_the_fitted_dictionary_can_be_saved_alone(tmp_path):
    model = tiny_model("llama")
    applied = METHOD.apply(model, tokens())
    back = Dictionary.load(applied.dictionary.save(tmp_path / "sae"))
    x = torch.randn(5, 32)
    assert torch.equal(back(x), applied.dictionary(x))
    assert back.metadata["score"]["fvu"] == applied.score.fvu


def test_an_interrupted_fit_leaves_no_hook():
    model = tiny_model("llama")

    def interrupt(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        METHOD.apply(model, tokens(), progress=interrupt)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 65, "width": 64}, "k is 65, above the width 64"),
        ({"width": 0}, "width is 0"),
        ({"tokens": -1}, "tokens is -1"),
        ({"batch_size": 2.5}, r"batch_size is 2\.5"),
        ({"lr": 0.0}, r"lr is 0\.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"aux_k": -1}, "aux_k is -1"),
        ({"aux_coefficient": float("inf")}, "aux_coefficient"),
        ({"sink_multiple": 0.5}, "sink_multiple"),
    ],
)
def test_impossible_parameters_are_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        TopKSAE(**values)


def test_impossible_combinations_are_refused_before_training():
    model = tiny_model("llama")
    with pytest.raises(GossamerError, match="k is 300, above the width 256"):
        TopKSAE(k=300).fit(model, tokens())
    with pytest.raises(GossamerError, match=r"did you mean model\.layers"):
        TopKSAE(hook="model.layer.0").fit(model, tokens())
    with pytest.raises(GossamerError, match="vocabulary"):
        TopKSAE().fit(model, torch.full((2, 8), 500))
    assert hooks_of(model) == 0


def test_the_smoke_claim_holds_for_the_method_and_fails_without_training(monkeypatch):
    smoke = CLAIMS[0]
    assert smoke.tier == "smoke"
    assert smoke.check([smoke.run(101)]) is Verdict.HOLDS
    monkeypatch.setattr(Trainer, "step", lambda trainer, rows: None)
    # Another seed: the trained figures are kept for claims that share them.
    assert smoke.check([smoke.run(102)]) is Verdict.FAILS


def test_claims_fail_for_figures_of_a_stub():
    """A dictionary that learns nothing, one that is dense, and a baseline let off too easily."""
    smoke, small, alive = CLAIMS
    good = {"k": 3.0, "l0_topk": 3.0, "fvu_topk": 0.1, "mcc_topk": 0.98, "mcc_random": 0.5}
    good |= {"l0_l1": 3.0, "fvu_l1": 0.5}
    for claim in (smoke, small):
        assert claim.check([good]) is Verdict.HOLDS
        assert claim.check([good | {"fvu_topk": 0.3}]) is Verdict.WEAKER
        for stub in (
            {"fvu_topk": 0.8, "mcc_topk": 0.5},
            {"l0_topk": 90.0, "fvu_topk": 0.0},
            {"l0_topk": 0.0},
            {"mcc_topk": 0.52},
            {"l0_l1": 1.0},
        ):
            assert claim.check([good | stub]) is Verdict.FAILS
    figures = {"mcc_topk": 0.98, "mcc_neither": 0.9, "fvu_topk": 0.1, "fvu_neither": 0.12}
    assert alive.check([figures]) is Verdict.HOLDS
    assert alive.check([figures | {"mcc_neither": 0.95}]) is Verdict.WEAKER
    assert alive.check([figures | {"mcc_neither": 0.98}]) is Verdict.FAILS
