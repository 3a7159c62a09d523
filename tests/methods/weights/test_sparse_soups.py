"""Soups of language models: phases, copies that differ in one factor, masks, undo."""

import pytest
import torch

from gossamer.core import GossamerError, Unstructured
from gossamer.methods import make
from gossamer.methods.weights.retrain.start import Successor, starting
from gossamer.methods.weights.sparse_soups import SparseSoups
from gossamer.models import Inputs, at_work, find_sites
from gossamer.models.loss import window_losses
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

QUICK = {"copies": 2, "steps": 4, "batch_size": 2, "lr": 3e-3}


def weights(model):
    return {site.name: site.weight(model).clone() for site in find_sites(model).sites}


def test_the_soup_is_the_mean_of_its_copies_and_stays_sparse(monkeypatch):
    held = []
    module = "gossamer.methods.weights.sparse_soups"
    real = __import__(module, fromlist=["finetune"]).finetune

    def watched(model, *args, **kwargs):
        real(model, *args, **kwargs)
        held.append(weights(model))

    monkeypatch.setattr(f"{module}.finetune", watched)
    model = tiny_model("llama")
    applied = SparseSoups(sparsity=0.75, phases=2, **QUICK).apply(model, random_tokens())
    assert len(held) == 4
    last = held[2:]
    for name, made in weights(model).items():
        assert torch.allclose(made, (last[0][name] + last[1][name]) / 2, atol=1e-7)
        assert not torch.equal(last[0][name], last[1][name])
        assert torch.equal(made != 0, applied.selection(name).mask())
    # The first phase removes half, the second half of the rest.
    shares = [phase["sparsity"] for phase in applied.facts["phases"]]
    assert shares == pytest.approx([0.5, 0.75])
    for name, first in held[0].items():
        assert not bool((last[0][name] != 0)[first == 0].any())
    assert applied.report().sparsity == pytest.approx(0.75, abs=1e-4)
    assert "phase 2 of 2 at 75.0%" in str(applied.report())


def test_retraining_recovers_what_pruning_lost():
    model, tokens = tiny_model("llama"), random_tokens()
    with make("magnitude", sparsity=0.5, pattern="model").apply(model):
        pruned = window_losses(model, tokens).mean
    with SparseSoups(phases=1, copies=2, steps=10, batch_size=4, lr=3e-3).apply(model, tokens):
        assert window_losses(model, tokens).mean < pruned - 0.05


@pytest.mark.parametrize("vary", ["order", "lr", "weight_decay"])
def test_copies_differ_in_one_factor(vary):
    method = SparseSoups(vary=vary, copies=3, lr=0.01, weight_decay=0.1, seed=7)
    plans = [method.plan(i).to_dict() for i in range(3)]
    changed = {k for k in plans[0] if len({repr(p[k]) for p in plans}) > 1}
    name = "seed" if vary == "order" else vary
    assert changed == {name}
    values = [p[name] for p in plans]
    middle = {"order": 8, "lr": 0.01, "weight_decay": 0.1}[vary]
    outer = [7, 9] if vary == "order" else [middle / 2, middle * 2]
    assert values == pytest.approx([outer[0], middle, outer[1]])


def test_greedy_is_no_worse_than_the_best_copy():
    model = tiny_model("llama")
    method = SparseSoups(soup="greedy", phases=1, **{**QUICK, "copies": 3, "lr": 0.05})
    with method.apply(model, random_tokens()) as applied:
        phase = applied.facts["phases"][0]
    assert phase["soup"] <= min(phase["members"]) + 1e-6
    assert 1 <= len(phase["chosen"]) <= 3


@pytest.mark.parametrize("pattern", ["2:4", "row", "block:4x4"])
def test_any_pattern(pattern):
    model = tiny_model("llama")
    method = SparseSoups(pattern=pattern, phases=2, **{**QUICK, "steps": 1})
    with method.apply(model, random_tokens()) as applied:
        for name in applied.masks:
            if pattern == "2:4":
                method.pattern.check(applied.selection(name))
        assert applied.report().sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("base", ["wanda", "sparsegpt", "random:seed=4", "lamp"])
def test_any_base_whose_masks_nest(base):
    pattern = "model" if base == "lamp" else "row"
    model = tiny_model("llama")
    before = weights(model)
    method = SparseSoups(base=base, pattern=pattern, phases=2, **{**QUICK, "steps": 1})
    with method.apply(model, random_tokens()) as applied:
        assert applied.report().sparsity == pytest.approx(0.5, abs=1e-2)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())


def test_labelled_inputs_serve_other_models():
    generator = torch.Generator().manual_seed(0)
    data = Inputs(
        {
            "pixel_values": torch.randn(8, 3, 16, 16, generator=generator),
            "labels": torch.arange(8) % 4,
        }
    )
    model = tiny_model("vit")
    with SparseSoups(phases=1, **QUICK).apply(model, data) as applied:
        assert applied.report().sparsity == pytest.approx(0.5, abs=1e-3)


def test_bfloat16_models_stay_bfloat16():
    model = tiny_model("llama").to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    applied = SparseSoups(phases=1, **QUICK).apply(model, random_tokens())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name in applied.masks:
        mask = applied.selection(name).mask()
        assert not bool(applied.sites[name].weight(model)[~mask].any())
    applied.restore()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_error_half_way_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    before = weights(model)

    def stop(done, total, what):
        if "copy 2" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SparseSoups(phases=1, **QUICK).apply(model, random_tokens(), progress=stop)
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())
    assert not at_work(model)


def test_undone_only_in_order():
    model = tiny_model("llama")
    soup = SparseSoups(phases=1, **QUICK).apply(model, random_tokens())
    later = make("magnitude", sparsity=0.8).apply(model)
    with pytest.raises(GossamerError, match="restore that first"):
        soup.restore()
    later.restore()
    soup.restore()
    assert all(torch.equal(w, weights(tiny_model("llama"))[n]) for n, w in weights(model).items())


def test_a_soup_without_undo_says_so():
    applied = SparseSoups(phases=1, **QUICK).apply(tiny_model("llama"), random_tokens(), undo=False)
    assert isinstance(applied, Successor)
    with pytest.raises(GossamerError, match="without undo"):
        applied.restore()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"copies": 1}, "copies is 1"),
        ({"phases": 0}, "phases is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"vary": "ordre"}, "did you mean order"),
        ({"soup": "best"}, "unknown soup"),
        ({"vary": "weight_decay", "weight_decay": 0.0}, "cannot vary"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"base": "teal"}, "does not prune weights in one pass"),
        ({"base": "sparse_soups"}, "does not prune weights in one pass"),
        ({"base": "wandda"}, "did you mean wanda"),
        ({"pattern": "2:4", "sparsity": 0.7}, "fixes the sparsity"),
    ],
)
def test_impossible_parameters_are_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        SparseSoups(**values)


def test_too_little_data_is_refused():
    with pytest.raises(GossamerError, match="at least 2"):
        SparseSoups(phases=1).apply(tiny_model("llama"), random_tokens().slice(1))


def test_a_base_that_revives_weights_is_refused(monkeypatch):
    model = tiny_model("llama")
    seeds = iter(range(100))
    monkeypatch.setattr(
        SparseSoups,
        "_start",
        lambda self, share: starting(f"random:seed={next(seeds)}", share, Unstructured("row")),
    )
    method = SparseSoups(base="random", phases=2, **{**QUICK, "steps": 1})
    before = weights(model)
    with pytest.raises(GossamerError, match="keeps .* weights that the last one removed"):
        method.apply(model, random_tokens())
    assert all(torch.equal(before[n], w) for n, w in weights(model).items())
