from dataclasses import replace

import pytest
import torch

from gossamer.claims.base import Verdict
from gossamer.claims.features.sparse_probing import CLAIMS
from gossamer.core import GossamerError
from gossamer.methods.features.sparse_probing import SparseProbing
from gossamer.models import Inputs, Tokens
from gossamer.models.labelled import Labelled
from tests.models.subjects import SUBJECTS
from tests.models.tiny import tiny_model

METHOD = SparseProbing(
    k=8,
    width=64,
    tokens=1024,
    latents=(4,),
    penalty="l2",
    baselines=("pca",),
    points=1,
    regimes=("scarcity", "noise"),
)


def data(**more):
    values = dict(SUBJECTS["labelled language model"].data().values)
    return Inputs({**values, **more})


def test_probing_leaves_the_model_alone_and_says_what_it_found():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    found = METHOD.probe(model, data(), progress=lambda done, total, what: seen.append(what))
    assert {s.task for s in found.shots} == {"class 0", "class 1", "class 2"}
    assert set(found.gains()) == {"scarcity", "noise"}
    assert "noise" in str(found)
    assert any("class 2, noise" in what for what in seen)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_given_dictionary_is_read_at_its_own_module():
    model = tiny_model("llama")
    first = replace(METHOD, hook="model.layers.0")
    made = first.fit(model, data())
    assert METHOD.paths(model) != first.paths(model)
    (own, *_), (named, *_) = METHOD.tasks(model, data(), made), first.tasks(model, data(), made)
    assert torch.equal(own.pool.x, named.pool.x)


def test_labelled_text_is_probed_like_inputs():
    values = data().values
    tokens = Tokens(values["input_ids"], torch.ones_like(values["input_ids"]).bool())
    text = Labelled(tokens, {"label": values["labels"]}, {})
    model, plain = tiny_model("llama"), Inputs({n: values[n] for n in ("input_ids", "labels")})
    made = METHOD.fit(model, plain)
    assert METHOD.probe(model, text, made) == METHOD.probe(model, plain, made)
    with pytest.raises(GossamerError, match="Labelled text with a label"):
        METHOD.probe(model, Labelled(tokens, {"mood": values["labels"]}, {}), made)


def test_apply_takes_out_exactly_the_probed_latents():
    model = tiny_model("llama")
    with METHOD.apply(model, data()) as applied:
        report = applied.report()
        size = applied.dictionary.d_sae
        assert report.sparsity == pytest.approx(len(applied.taken) / size)
        assert 4 <= len(applied.taken) <= 12
        ids = data().values["input_ids"][:2]
        applied.restore()
        kept = []
        handle = model.get_submodule(applied.hook).register_forward_hook(
            lambda module, args, out: kept.append(out if torch.is_tensor(out) else out[0])
        )
        model(input_ids=ids)
        handle.remove()
        rows = kept[0].detach().reshape(-1, kept[0].shape[-1])
        codes = applied.dictionary.encode(rows).to_dense()
        gone = codes[:, applied.taken] @ applied.dictionary.W_dec[applied.taken]
    again = METHOD.apply(model, data())
    moved = []
    handle = model.get_submodule(again.hook).register_forward_hook(
        lambda module, args, out: moved.append(out if torch.is_tensor(out) else out[0])
    )
    model(input_ids=ids)
    handle.remove()
    again.restore()
    new = moved[0].detach().reshape(rows.shape)
    assert torch.allclose(new, rows - gone, atol=1e-4)


def test_shift_is_left_out_with_a_warning_or_tested_where_marked():
    both = replace(METHOD, regimes=("scarcity", "shift"))
    with both.apply(tiny_model("llama"), data()) as applied:
        assert "shift" in applied.report().warnings[0]
    shifted = torch.arange(48) >= 36
    found = both.probe(tiny_model("llama"), data(shifted=shifted))
    assert found.of("shift")
    only = replace(METHOD, regimes=("shift",))
    with pytest.raises(GossamerError, match="shifted"):
        only.probe(tiny_model("llama"), data())


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("regimes", ("scarce",), "scarcity"),
        ("regimes", (), "empty"),
        ("baselines", ("logistics",), "logistic"),
        ("latents", (), "latents"),
        ("latents", (0,), "latents"),
        ("penalty", "l3", "l1"),
        ("points", 0, "points"),
        ("test_share", 1.0, "test_share"),
    ],
)
def test_impossible_fields_are_refused(field, value, word):
    with pytest.raises(GossamerError, match=word):
        SparseProbing(**{field: value})


REGIMES = ("scarcity", "imbalance", "noise", "shift")
FINE = {
    "planted": 0.1,
    "leak": 0.05,
    "coin": 0.5,
    "coin_latents": 0.5,
    **{f"gain_{r}": 0.002 for r in REGIMES},
    **{f"latents_{r}": 0.8 for r in REGIMES},
}


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ({}, Verdict.HOLDS),
        ({"gain_noise": -0.03}, Verdict.WEAKER),
        ({"gain_scarcity": 0.03}, Verdict.FAILS),
        # A harness that can see no gain says nothing by seeing none.
        ({"planted": 0.0}, Verdict.FAILS),
        ({"leak": 0.0}, Verdict.FAILS),
        # Labels that are coins were learnt: something leaks.
        ({"coin_latents": 0.8}, Verdict.FAILS),
        # Latents that tell nothing would be no rival.
        ({"latents_shift": 0.5}, Verdict.FAILS),
    ],
)
def test_the_claim_fails_for_a_blind_or_leaking_harness(figures, verdict):
    assert CLAIMS[0].check([{**FINE, **figures}] * 3) == verdict
