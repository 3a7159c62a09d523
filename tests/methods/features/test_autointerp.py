from dataclasses import replace

import pytest
import torch

from gossamer.claims.base import Verdict
from gossamer.claims.features.autointerp import CLAIMS
from gossamer.core import GossamerError
from gossamer.methods.features.autointerp import AutoInterp
from gossamer.methods.features.interp.judges import WordJudge
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

METHOD = AutoInterp(
    k=8, width=64, tokens=1024, latents=6, length=4, least=4, shown=4, tested=6, least_score=0.6
)


class Silent(WordJudge):
    def complete(self, prompts, *, max_tokens):
        raise AssertionError("asked")


def test_interpreting_leaves_the_model_alone_and_gives_every_score():
    model = tiny_model("llama")
    method = replace(METHOD, scorers=("detection", "fuzzing", "embedding", "surprisal"))
    found = method.interpret(model, random_tokens())
    assert len(found) == 6
    for one in found:
        assert set(one.scores) == set(method.scorers)
        assert all(0 <= value <= 1 for value in one.scores.values())
        assert str(one).startswith(f"latent {one.latent}: ")
    assert not any(m._forward_hooks for m in model.modules())


def test_a_given_dictionary_is_read_at_its_own_module():
    model = tiny_model("llama")
    made = replace(METHOD, hook="model.layers.0").fit(model, random_tokens())
    assert METHOD.paths(model) != "model.layers.0"
    named = replace(METHOD, hook="model.layers.0").interpret(model, random_tokens(), made)
    assert METHOD.interpret(model, random_tokens(), made) == named
    assert replace(METHOD, hook="model.layers.1").interpret(model, random_tokens(), made) != named
    made.metadata["hook_name"] = "blocks.0"
    with pytest.raises(GossamerError, match="no module 'blocks.0'"):
        METHOD.interpret(model, random_tokens(), made)


def test_the_cost_is_known_before_and_too_much_is_not_asked():
    model = tiny_model("llama")
    made = METHOD.fit(model, random_tokens())
    cost = METHOD.cost(model, random_tokens(), made)
    assert cost.calls > 6
    tight = replace(METHOD, most_tokens=cost.tokens - 1)
    with pytest.raises(GossamerError, match=f"asked {cost.calls:,} calls.*most_tokens"):
        tight.interpret(model, random_tokens(), made, judge=Silent())
    asked = []

    class Counting(WordJudge):
        def complete(self, prompts, *, max_tokens):
            asked.extend(prompts)
            return super().complete(prompts, max_tokens=max_tokens)

    METHOD.interpret(model, random_tokens(), made, judge=Counting())
    assert len(asked) == cost.calls


def test_apply_keeps_only_latents_whose_words_hold():
    model = tiny_model("llama")
    with METHOD.apply(model, random_tokens()) as applied:
        good = [one.latent for one in applied.explained if one.score >= 0.6]
        assert list(applied.kept) == good
        assert len(good) > 0
        report = applied.report()
        assert report.sparsity == pytest.approx(1 - len(good) / 64)
        assert "6 latents in words" in report.notes[0]
        kept = []
        handle = model.get_submodule(applied.hook).register_forward_hook(
            lambda module, args, out: kept.append(out if torch.is_tensor(out) else out[0])
        )
        with torch.no_grad():
            model(input_ids=random_tokens().input_ids)
        handle.remove()
        made = applied.dictionary
        spread = kept[0].reshape(-1, 32) - made.b_dec
        atoms = made.W_dec[list(applied.kept)]
        inside = torch.linalg.lstsq(atoms.T, spread.T).solution
        assert torch.allclose(atoms.T @ inside, spread.T, atol=1e-3)
    strict = replace(METHOD, least_score=1.0)
    with strict.apply(tiny_model("llama"), random_tokens()) as applied:
        assert applied.report().sparsity >= report.sparsity


def test_another_judge_by_its_address_needs_a_name():
    with pytest.raises(GossamerError, match="judge_model"):
        replace(METHOD, judge="http://127.0.0.1:1/v1").judged_by()


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("scorers", ("detections",), "detection"),
        ("scorers", (), "empty"),
        ("least", 1, "least"),
        ("latents", 0, "latents"),
        ("least_score", 1.5, "least_score"),
        ("most_tokens", 0, "most_tokens"),
    ],
)
def test_impossible_fields_are_refused(field, value, word):
    with pytest.raises(GossamerError, match=word):
        AutoInterp(**{field: value})


def test_too_little_text_is_refused():
    with pytest.raises(GossamerError, match="no latent fires in 2000"):
        replace(METHOD, least=2000).interpret(tiny_model("llama"), random_tokens())


NAMES = ("detection", "fuzzing", "embedding", "surprisal")
FINE = {
    **{f"{name}_{kind}": 1.0 for name in NAMES for kind in ("true", "own")},
    **{f"{name}_other": 0.5 for name in NAMES},
    "calls": 1.0,
    "hits": 1.0,
    "written": 2.0,
    "written_random": 0.0,
}


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ({}, Verdict.HOLDS),
        ({"hits": 0.8}, Verdict.WEAKER),
        ({"detection_own": 0.9}, Verdict.WEAKER),
        ({"fuzzing_other": 0.7}, Verdict.FAILS),
        ({"detection_true": 0.5}, Verdict.FAILS),
        ({"calls": 1.1}, Verdict.FAILS),
        ({"written": 0.0}, Verdict.FAILS),
    ],
)
def test_the_claim_fails_for_scores_that_know_nothing(figures, verdict):
    assert CLAIMS[0].check([{**FINE, **figures}] * 3) == verdict
