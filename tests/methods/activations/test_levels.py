"""CETT on small arrays and tiny models, and the level a perplexity allows."""

import math

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.activations.calibration import token_loss
from gossamer.methods.activations.cett import CETT
from gossamer.methods.activations.levels import (
    cett,
    cett_curves,
    cett_gates,
    perplexity_level,
    ppl_sparsity,
)
from gossamer.methods.activations.teal import TEAL
from gossamer.methods.activations.wina import WINA
from gossamer.models import Tokens, find_sites
from tests.models.tiny import tiny_model

torch.set_num_threads(1)


def _tokens(rows: int = 6, length: int = 32, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_ids(torch.randint(3, 128, (rows, length), generator=generator))


def test_the_norm_is_of_the_sum_not_the_sum_of_norms() -> None:
    # Two dropped neurons that cancel, and one kept.
    weight = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]])
    rows = torch.tensor([[0.5, 0.5, 3.0], [0.5, 0.0, 3.0], [0.0, 0.0, 0.0]])
    assert cett(rows, weight, 1.0).tolist() == pytest.approx([0.0, 0.5 / math.hypot(0.5, 6), 0.0])
    assert cett(rows, weight, 9.0).tolist() == pytest.approx([1.0, 1.0, 0.0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_every_layer_has_the_level_it_was_given(name: str) -> None:
    model, data = tiny_model(name), _tokens()
    curves = cett_curves(model, data, (0.3,))
    for curve in curves.curves:
        assert list(curve.errors) == sorted(curve.errors)
        assert curve.errors[-1] == pytest.approx(1.0, abs=1e-4)
        assert curve.threshold(0.0) == pytest.approx(0.0, abs=curve.thresholds[-1] / 50)
        assert curve.threshold(0.2) < curve.threshold(0.4)
    down = "model.layers.0.mlp.down_proj"
    if name == "llama":
        seen: list[torch.Tensor] = []
        module = model.get_submodule(down)
        handle = module.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
        model(data.input_ids)
        handle.remove()
        error = cett(seen[0].flatten(0, 1), module.weight.detach(), curves.curves[0].threshold(0.3))
        assert float(error.mean()) == pytest.approx(0.3, rel=0.02)


def test_the_score_is_winas_on_the_down_projection() -> None:
    model, data = tiny_model("llama"), _tokens()
    (ours, *_) = cett_gates(model, data, 0.3)
    with WINA(policy="quantile").apply(model, data) as work:
        theirs = work.gates[ours.name]
    ratio = ours.cut / theirs.cut
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)


def test_a_sparsity_fixes_the_level() -> None:
    model, data = tiny_model("llama"), _tokens()
    with CETT(sparsity=0.6).apply(model, data) as work:
        assert work.report().sparsity == pytest.approx(0.6, abs=1e-3)
        shares = [gate.sparsity for gate in work.gates.values()]
        assert shares[0] != shares[1]
    with CETT(level=0.0).apply(model, data) as work:
        assert work.report().sparsity == 0.0


@pytest.mark.parametrize("level", [-0.1, 1.1, "much"])
def test_levels_that_are_none_are_refused(level) -> None:
    with pytest.raises(GossamerError, match="level is"):
        CETT(level=level)


def test_perplexity_grows_by_what_was_allowed() -> None:
    model = tiny_model("llama")
    # Its own most likely tokens: text it predicts, and predicts worse under masks.
    ids = model.generate(_tokens(16, 2).input_ids, max_new_tokens=30, do_sample=False)
    data = Tokens.from_ids(ids)
    found = ppl_sparsity(model, data, percent=10.0)
    assert 0 < found.level < 1
    assert 0 < found.sparsity < 1
    assert found.growth <= 1.1 * (1 + 1e-2)
    sites = find_sites(model)
    dense, _ = token_loss(model, sites, data)
    loss, shares = token_loss(model, sites, data, found.gates)
    assert math.exp(loss - dense) == pytest.approx(found.growth, rel=1e-5)
    assert shares == pytest.approx(dict(found.shares))


def test_the_loss_is_the_models_own() -> None:
    model, data = tiny_model("llama"), _tokens()
    expected = float(model(data.input_ids, labels=data.input_ids).loss.detach())
    assert token_loss(model, find_sites(model), data)[0] == pytest.approx(expected, rel=1e-5)


def test_a_level_that_harms_nothing_is_the_highest() -> None:
    model, data = tiny_model("llama"), _tokens(2, 8)
    found = perplexity_level(model, data, lambda level: [], percent=1.0)
    assert (found.level, found.growth, found.sparsity) == (1.0, pytest.approx(1.0), 0.0)
    with pytest.raises(GossamerError, match="percent is 0"):
        perplexity_level(model, data, lambda level: [], percent=0)


def test_cett_reports_the_level_found_and_takes_one_amount() -> None:
    model = tiny_model("llama")
    method = CETT(sparsity=0.6)
    level = cett_curves(model, _tokens()).level_for(0.6)
    with method.apply(model, _tokens()) as work:
        fact = f"error level of all layers, found for sparsity 0.6: {level:.4f}"
        assert fact in str(work.report())
        assert "level 0.2" not in str(work.report())
        state = work.state()
    with method.reattach(tiny_model("llama"), state.meta, state.tensors) as again:
        assert fact in again.report().notes
    with pytest.raises(GossamerError, match="give one of them"):
        CETT(level=0.1, sparsity=0.5)


def test_reports_say_which_tokens_are_masked() -> None:
    data = _tokens()
    for method, said in (
        (CETT(protocol="paper"), "every token is masked"),
        (TEAL(protocol="paper"), "% are masked"),
        (TEAL(dense_prefix=data.length), f"no token is masked in texts of {data.length} tokens"),
    ):
        with method.apply(tiny_model("llama"), data) as work:
            assert said in str(work.report())
