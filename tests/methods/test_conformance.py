"""Checks that every method in the package passes, generated from the directory.

A method opts out of a check by name, with a reason, in its ``exempt`` mapping.
"""

import json
import math
from dataclasses import fields, replace

import pytest
import torch

import gossamer
from gossamer import methods
from gossamer.claims.base import Verdict
from gossamer.claims.runner import claims_of
from gossamer.core import FAMILIES, GossamerError, Method, systems
from gossamer.models import Inputs, at_work
from gossamer.models.store import read_stages
from tests.models.subjects import SUBJECTS, Subject, random_tokens
from tests.models.tiny import ARCHITECTURES, DECODERS, tiny_model

KEYS = methods.keys()
CHECKS = frozenset(
    {
        "dense at sparsity 0",
        "exact sparsity",
        "every architecture",
        "sparsity range",
        "encoders",
        "reads data",
        # Of the attention family's contract, tests/methods/attention/test_contract.py.
        "padding",
        "static cache",
        "beam search",
        "assisted decoding",
        "beats random",
        "beats window",
    }
)


def example(key: str, **values: object) -> Method:
    """The method with parameters that keep it cheap on a tiny model."""
    return methods.make(key, **{**methods.get(key).example, **values})


def has(key: str, name: str) -> bool:
    return any(f.name == name and f.init for f in fields(methods.get(key)))


def unless_exempt(key: str, check: str) -> None:
    if (reason := methods.get(key).exempt.get(check)) is not None:
        pytest.skip(f"{key}: {reason}")


def subject(key: str) -> Subject:
    """What the method applies to."""
    return SUBJECTS[methods.get(key).subject]


def inputs_for(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        generator = torch.Generator().manual_seed(5)
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": random_tokens(7).input_ids[:3]}


@torch.no_grad()
def outputs(model: torch.nn.Module, name: str = "llama") -> torch.Tensor:
    found = model(**inputs_for(name))
    return getattr(found, "logits", None) if hasattr(found, "logits") else found[0]


def hooks_of(model: torch.nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


def snapshot(model: torch.nn.Module) -> dict[str, object]:
    config = getattr(model, "config", None)
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "config": config.to_json_string(use_diff=False) if config else None,
        "attention": config._attn_implementation if config else None,
        "modes": [m.training for m in model.modules()],
        "forwards": ["forward" in vars(m) for m in model.modules()],
        # A vision-language model of transformers hooks its own vision tower.
        "hooks": hooks_of(model),
    }


def assert_untouched(model: torch.nn.Module, before: dict[str, object]) -> None:
    now = snapshot(model)
    old_state, new_state = before.pop("state"), now.pop("state")
    assert old_state.keys() == new_state.keys()
    for name, value in old_state.items():
        assert torch.equal(value, new_state[name]), name
    assert now == before


@pytest.mark.parametrize("key", KEYS)
class TestEveryMethod:
    def test_card_is_complete(self, key):
        card = methods.get(key).card
        assert card.family in FAMILIES
        assert methods.get(key).__module__.split(".")[2] == card.family
        assert card.title.strip() == card.title != ""
        for axis in (
            "site",
            "score",
            "pattern",
            "budget",
            "schedule",
            "update",
            "kernel",
            "departs",
        ):
            assert getattr(card, axis).strip(), axis
        titles = {s.title: s.key for s in systems().values()}
        assert card.system == titles.get(card.title)
        assert card.year is None or 1980 < card.year < 2100
        json.dumps(card.to_dict())

    def test_is_documented(self, key):
        cls = methods.get(key)
        assert (cls.__doc__ or "").strip()
        assert getattr(gossamer, cls.__name__) is cls

    def test_exemptions_name_checks_and_reasons(self, key):
        for check, reason in methods.get(key).exempt.items():
            assert check in CHECKS
            assert len(reason) > 10

    def test_serialised_form_round_trips(self, key):
        method = example(key)
        plain = json.loads(json.dumps(method.to_dict()))
        assert type(method).from_dict(plain) == method
        assert methods.make(plain.pop("method"), **plain) == method

    def test_is_immutable(self, key):
        method = example(key)
        with pytest.raises(AttributeError):
            setattr(method, fields(method)[0].name, 1)

    def test_unknown_parameters_are_refused(self, key):
        with pytest.raises(GossamerError, match="unknown parameter"):
            methods.make(key, sparsityy=0.5)

    @pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, math.nan, math.inf, "half", [0.5]])
    def test_impossible_sparsity_is_refused(self, key, bad):
        if not has(key, "sparsity"):
            pytest.skip(f"{key} has no sparsity")
        with pytest.raises(ValueError, match="sparsity"):
            methods.make(key, sparsity=bad)

    @pytest.mark.parametrize("bad", ["", "3:2", "0:4", "block:0x4", "rows", "2:4:8", "window:1"])
    def test_impossible_pattern_is_refused(self, key, bad):
        if not has(key, "pattern"):
            pytest.skip(f"{key} has no pattern")
        with pytest.raises(ValueError, match="pattern"):
            methods.make(key, pattern=bad)

    def test_deterministic_under_a_seed(self, key):
        it = subject(key)
        runs = []
        for _ in range(2):
            model = it.build()
            with example(key).apply(model, it.data()):
                runs.append(it.outputs(model))
        assert torch.equal(*runs)

    def test_another_seed_samples_anew(self, key):
        it = subject(key)
        if not has(key, "seed"):
            pytest.skip(f"{key} does not sample")
        runs = []
        for seed in (0, 1):
            with example(key, seed=seed).apply(it.build(), it.data()) as applied:
                runs.append(it.outputs(applied.model))
        assert not torch.equal(*runs)

    def test_changes_the_model(self, key):
        it = subject(key)
        model = it.build()
        dense = it.outputs(model)
        with example(key).apply(model, it.data()):
            assert not torch.allclose(it.outputs(model), dense, atol=1e-6)

    @pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
    def test_exact_sparsity(self, key, sparsity):
        it = subject(key)
        unless_exempt(key, "exact sparsity")
        if not has(key, "sparsity"):
            pytest.skip(f"{key} has no sparsity")
        model = it.build()
        with example(key, sparsity=sparsity).apply(model, it.data()) as applied:
            report = applied.report()
            assert report.sparsity == pytest.approx(sparsity, abs=1e-3)
            assert all(0 <= row.sparsity <= 1 for row in report.rows)
            assert len({row.name for row in report.rows}) == len(report.rows)
            json.dumps(report.to_dict(), allow_nan=False)
            assert str(report)

    def test_sparsity_zero_is_dense(self, key):
        it = subject(key)
        unless_exempt(key, "dense at sparsity 0")
        model = it.build()
        dense = it.outputs(model)
        with example(key, sparsity=0.0).apply(model, it.data()):
            assert torch.allclose(it.outputs(model), dense, atol=1e-5)

    def test_restore_leaves_no_trace(self, key):
        it = subject(key)
        model = it.build()
        before, dense = snapshot(model), it.outputs(model)
        applied = example(key).apply(model, it.data())
        applied.restore()
        applied.restore()
        assert_untouched(model, before)
        assert torch.equal(it.outputs(model), dense)
        assert not at_work(model)

    def test_a_failure_while_applying_leaves_no_trace(self, key):
        unless_exempt(key, "reads data")
        it = subject(key)
        model = it.build()
        before = snapshot(model)
        if it.broken is None:
            pytest.skip(f"nothing is known to break a {methods.get(key).subject} half-way")
        if not methods.get(key).needs and methods.get(key).card.family in ("weights", "attention"):
            pytest.skip(f"{key} reads no data")
        with pytest.raises((ValueError, IndexError)):
            example(key).apply(model, it.broken())
        assert_untouched(model, before)

    def test_unusable_data_is_refused(self, key):
        it = subject(key)
        if not methods.get(key).needs:
            pytest.skip(f"{key} reads no data")
        with pytest.raises(ValueError, match="."):
            example(key).apply(it.build(), 3.5)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_every_architecture(self, key, architecture):
        unless_exempt(key, "every architecture")
        if methods.get(key).subject != "language model":
            pytest.skip(f"{key} applies to a {methods.get(key).subject}")
        if architecture not in DECODERS:
            unless_exempt(key, "encoders")
        model = tiny_model(architecture)
        before, dense = snapshot(model), outputs(model, architecture)
        data = Inputs(inputs_for("vit")) if architecture == "vit" else random_tokens()
        with example(key).apply(model, data) as applied:
            changed = outputs(model, architecture)
            assert torch.isfinite(changed).all()
            assert not torch.equal(changed, dense)
            assert applied.report().rows
        assert_untouched(model, before)

    def test_saved_and_loaded_alike(self, key, tmp_path):
        it = subject(key)
        model = it.build()
        method = example(key)
        applied = method.apply(model, it.data())
        expected = it.outputs(model)
        if hasattr(model, "save_pretrained"):
            applied.save(tmp_path / "out")
            assert [p.name for p in tmp_path.iterdir()] == ["out"]
            (stage,) = read_stages(tmp_path / "out")
            again = type(model).from_pretrained(tmp_path / "out").eval()
            kept, meta, tensors = stage.method, stage.meta, stage.tensors
        else:
            again, state = it.build(), applied.state()
            tensors = state.tensors
            kept = json.loads(json.dumps(method.to_dict()))
            meta = json.loads(json.dumps(state.meta))
        back = methods.make(kept["method"], **{k: v for k, v in kept.items() if k != "method"})
        attached = back.reattach(again, meta, tensors)
        assert torch.allclose(it.outputs(again), expected, atol=1e-6)
        assert attached.report().sparsity == pytest.approx(applied.report().sparsity, abs=1e-6)
        applied.restore()
        if methods.get(key).card.family != "weights":
            attached.restore()

    def test_varies_by_replace(self, key):
        if has(key, "seed"):
            assert replace(example(key), seed=3).seed == 3
        elif has(key, "sparsity"):
            assert replace(example(key, sparsity=0.5), sparsity=0.25).sparsity == 0.25

    def test_smoke_claim_exists(self, key):
        claims = claims_of(key)
        assert any(claim.tier == "smoke" for claim in claims)
        assert len({claim.name for claim in claims}) == len(claims)
        for claim in claims:
            assert claim.sentence
            assert claim.paper
            assert claim.experiment
            assert len(set(claim.seeds)) == len(claim.seeds) >= 1


@pytest.mark.parametrize("key", KEYS)
def test_smoke_claims_run(key):
    for claim in claims_of(key):
        if claim.tier != "smoke":
            continue
        figures = dict(claim.run(claim.seeds[0]))
        assert figures
        assert all(math.isfinite(float(v)) for v in figures.values()), claim.name
        assert claim.check([figures]) in (Verdict.HOLDS, Verdict.WEAKER), (claim.name, figures)
        assert claim.ours.format(**figures)


def test_abstract_or_final():
    """No method class inherits from another method's concrete class."""
    classes = [methods.get(key) for key in KEYS]
    for cls in classes:
        assert not [other for other in classes if other is not cls and issubclass(cls, other)]
