"""The sweep: what it measures, what it chooses, what it leaves behind."""

import math

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.evaluate import score
from gossamer.methods import make
from gossamer.methods.weights.essential_sparsity import EssentialSparsity
from gossamer.models import Inputs, Tokens, at_work
from gossamer.models.loss import window_losses
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

SWEEP = "0.2:0.8:0.2"


def own_words(model, seed=0):
    """Text that the random model itself likes, so that pruning costs something."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (12, 1), generator=generator)
    with torch.no_grad():
        for _ in range(15):
            odds = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator)], 1)
    return Tokens.from_ids(ids)


@pytest.fixture(scope="module")
def text():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 4
    return own_words(model)


def confident():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 4
    return model


@pytest.mark.parametrize(
    ("base", "pattern", "allocation"),
    [
        ("magnitude", "model", "uniform"),
        ("magnitude", "layer", "erk"),
        ("wanda", "row", "uniform"),
        ("random:seed=3", "row", "uniform"),
        ("sparsegpt", "row", "owl"),
    ],
)
def test_every_point_is_what_pruning_alone_gives(text, base, pattern, allocation):
    model, calibration = confident(), random_tokens()
    method = EssentialSparsity(base=base, pattern=pattern, allocation=allocation, sweep=SWEEP)
    curve = method.curve(model, text, calibration)
    assert curve.dense == pytest.approx(score(model, text).loss, rel=1e-6)
    assert len(curve.sparsity) == 5
    for share, loss in zip((0.2, 0.4, 0.6, 0.8), curve.losses[1:], strict=True):
        key, *rest = base.split(":")
        options = dict(part.split("=") for part in rest)
        one = make(key, sparsity=share, pattern=pattern, allocation=allocation, **options)
        with one.apply(model, calibration) as applied:
            assert any(applied.report().sparsity == pytest.approx(s) for s in curve.sparsity)
            assert loss == pytest.approx(score(model, text).loss, rel=1e-5)
    assert not at_work(model)


def test_groups_sweep_how_many_stay(text):
    curve = EssentialSparsity(pattern="2:8", sweep="0.5").curve(confident(), text)
    assert curve.patterns == ("dense", "7:8", "6:8", "5:8", "4:8", "3:8", "2:8", "1:8")
    assert curve.sparsity == pytest.approx([i / 8 for i in range(8)])


def test_apply_leaves_the_largest_sparsity_within_the_tolerance(text):
    model = confident()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dense = window_losses(model, text).mean
    applied = EssentialSparsity(sweep="0.1:0.9:0.1", tolerance=0.05).apply(model, text)
    points = applied.facts["curve"]["points"]
    within = [p["sparsity"] for p in points if p["loss"] <= 1.05 * dense]
    assert 0 < max(within) < 0.9
    assert applied.report().sparsity == pytest.approx(max(within), abs=1e-9)
    assert window_losses(model, text).mean <= 1.05 * dense
    report = str(applied.report())
    assert "at tolerance 5.0%" in report
    assert "elbow at" in report
    assert "interval" in report
    applied.restore()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_no_tolerance_removes_nothing_and_says_so(text):
    model = confident()
    with EssentialSparsity(sweep="0.5,0.9", tolerance=0.0).apply(model, text) as applied:
        assert applied.report().sparsity == 0.0
        assert any("nothing was removed" in w for w in applied.report().warnings)
    with EssentialSparsity(pattern="2:4", tolerance=0.0).apply(model, text) as applied:
        assert applied.report().sparsity == 0.0


def test_a_sweep_that_ends_too_soon_says_so(text):
    with EssentialSparsity(sweep="0.1,0.2", tolerance=9.0).apply(confident(), text) as applied:
        assert any("sweep further" in w for w in applied.report().warnings)


def test_calibrating_bases_measure_on_other_windows(text, monkeypatch):
    seen = {}
    real = EssentialSparsity.curve

    def watched(self, model, heldout, calibration=None, **options):
        seen[self.base] = heldout.input_ids, calibration.input_ids
        return real(self, model, heldout, calibration, **options)

    monkeypatch.setattr(EssentialSparsity, "curve", watched)
    for base in ("magnitude", "wanda"):
        with EssentialSparsity(base=base, pattern="row", sweep="0.5").apply(confident(), text):
            pass
    assert torch.equal(seen["magnitude"][0], text.input_ids)
    measured, calibrated = seen["wanda"]
    assert torch.equal(torch.cat([calibrated, measured]), text.input_ids)
    assert len(measured) == len(calibrated) == 6


def test_held_out_text_can_be_given(text):
    model = confident()
    method = EssentialSparsity(base="wanda", pattern="row", sweep="0.5", tolerance=9.0)
    with method.apply(model, random_tokens(), heldout=text) as applied:
        dense = applied.facts["curve"]["points"][0]["loss"]
    assert dense == pytest.approx(window_losses(confident(), text).mean)


def test_fine_tuning_under_the_mask_lowers_every_point():
    model, train = confident(), own_words(confident(), seed=1)
    held = own_words(confident(), seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = EssentialSparsity(sweep="0.5,0.7").curve(model, held, train)
    tuned = EssentialSparsity(sweep="0.5,0.7", steps=8, lr=1e-3).curve(model, held, train)
    assert all(b < a for a, b in zip(plain.losses[1:], tuned.losses[1:], strict=True))
    assert plain.dense != tuned.dense  # The dense point is fine-tuned alike.
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    method = EssentialSparsity(sweep="0.5", steps=2, lr=1e-3, tolerance=9.0)
    applied = method.apply(model, train)
    for name in applied.masks:
        mask = applied.selection(name).mask()
        weight = applied.sites[name].weight(model)
        assert not bool(weight[~mask].any())
        assert not torch.equal(weight[mask], before[f"{name}.weight"][mask])
    applied.restore()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_labelled_inputs_serve_other_models():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, 16, 16, generator=generator)
    model = tiny_model("vit")
    with torch.no_grad():
        labels = model(pixel_values=pixels).logits.argmax(-1)
    curve = EssentialSparsity(sweep=SWEEP).curve(
        model, Inputs({"pixel_values": pixels, "labels": labels})
    )
    assert curve.ceiling == pytest.approx(math.log(4))
    assert curve.windows == 8
    assert curve.dense < curve.losses[-1]


def test_an_interrupt_leaves_the_model_as_it_was(text):
    model = confident()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def stop(done, total, what):
        assert total == 5
        if done == 3:
            raise KeyboardInterrupt

    for steps in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            EssentialSparsity(sweep=SWEEP, steps=steps).apply(model, text, progress=stop)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert not at_work(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sweep": "0.5,0.4"}, "sweep is"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"base": "wandda"}, "did you mean wanda"),
        ({"base": "teal"}, "does not prune weights in one pass"),
        ({"base": "essential_sparsity"}, "does not prune weights in one pass"),
        ({"pattern": "4:4"}, "removes nothing"),
        ({"steps": -1}, "steps is -1"),
        ({"lr": 0.0}, "lr is 0"),
        ({"allocation": "erk"}, "nothing to split"),
        ({"base": "dsnot", "pattern": "block:4x4"}, "dsnot refines"),
    ],
)
def test_impossible_parameters_are_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        EssentialSparsity(**values)


def test_models_that_cannot_be_measured_are_refused(text):
    broken = confident()
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(GossamerError, match="dense model's loss is nan"):
        EssentialSparsity(sweep="0.5").curve(broken, text)
    with pytest.raises(GossamerError, match="causal language model"):
        EssentialSparsity(sweep="0.5").apply(tiny_model("bert"), text)
    with pytest.raises(GossamerError, match="at least 2 windows"):
        EssentialSparsity(base="wanda", pattern="row").apply(confident(), text.slice(1))
    with pytest.raises(GossamerError, match="divisible by 5"):
        EssentialSparsity(pattern="2:5").apply(confident(), text)
