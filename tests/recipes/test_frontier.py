"""Climbing: who passes, who stops where, and what the dense model cannot do."""

import pytest
import torch

from gossamer import methods
from gossamer.core import GossamerError
from gossamer.evaluate.long_context import Row, samples
from gossamer.methods.attention.base import AttentionMethod
from gossamer.models import Loaded
from gossamer.recipes.frontier import CONTROLS, Cell, able, at_amount, candidates, climb, measure
from tests.evaluate.long_context.conftest import model, tokenizer  # noqa: F401


def row(method, task, score):
    return Row(
        method=method,
        task=task,
        phase="prefill",
        density=0.5,
        rho=0.9,
        batch=1,
        length=64,
        score=score,
        part=score,
        samples=200,
        question="seen",
        scope="low",
        dispersion="low",
    )


def cell(name, sparsity, **lost):
    scores = {t: tuple([0.0] * n + [1.0] * (200 - n)) for t, n in lost.items()}
    return Cell(name, sparsity, scores, {t: row(name, t, 1 - n / 200) for t, n in lost.items()})


def test_a_method_stops_at_its_first_failure():
    dense = cell("dense", 0.0, find=0, count=0)
    found = climb(
        dense,
        [
            cell("a", 0.5, find=0, count=0),
            cell("a", 0.75, find=0, count=40),
            cell("a", 0.9, find=0, count=0),
            cell("b", 0.5, find=120, count=0),
        ],
        margin=0.05,
    )
    assert found.passing == {"a": 0.5, "b": 0.0}
    assert found.failed("a", 0.75) == ("count",)
    # Judged all the same, but it does not count any more.
    assert found.passes("a", 0.9)
    assert found.failed("b", 0.5) == ("find",)


def test_what_dense_cannot_do_is_left_out_and_named():
    dense = cell("dense", 0.0, find=0, count=150)
    assert able(dense) == ("find",)
    found = climb(dense, [cell("a", 0.5, find=0, count=200)], margin=0.05)
    assert found.unable == ("count",)
    assert found.passing == {"a": 0.5}
    with pytest.raises(GossamerError, match="answers no task well enough"):
        climb(cell("dense", 0.0, count=150), [])


def test_candidates_come_from_the_directory():
    found = candidates()
    assert "streaming_llm" in found
    assert "quest" in found
    assert not {*CONTROLS, "masformer", "prefill_decode", "sparse_frontier"} & {*found}
    for key in found:
        made = at_amount(key, 0.5, 256)
        assert isinstance(made, AttentionMethod)
        assert made.length == 256


def test_amounts():
    assert at_amount("oracle_top_k:block_size=8", 0.75, 128) == methods.make(
        "oracle_top_k", block_size=8, sparsity=0.75, length=128
    )
    flex = at_amount("flexprefill", 0.5, 1024)
    assert flex.gamma == 0.9
    assert flex.block_size == 32
    for bad, message in (("wanda", "does not make attention sparse"), ("quset", "did you mean")):
        with pytest.raises(GossamerError, match=message):
            at_amount(bad, 0.5, 128)


def test_a_cell_measures_and_leaves_the_model_as_it_was(model, tokenizer):  # noqa: F811
    loaded = Loaded(model, tokenizer)
    prompts = {"niah_single": samples("niah_single", tokenizer, length=96, count=2)}
    ids = torch.tensor([prompts["niah_single"][0].ids])
    with torch.no_grad():
        before = model(ids).logits
    dense = measure(loaded, prompts, None)
    assert dense.density == 1.0
    method = at_amount("streaming_llm:sink=1", 0.5, 96)
    found = measure(loaded, prompts, method, name="w", sparsity=0.5, dense=dense)
    (own,) = found.rows.values()
    assert own.phase == "prefill+decode"
    assert own.density == pytest.approx(0.5, abs=0.05)
    assert 0.0 < own.rho < 1.0
    assert own.dense_seconds == dense.rows["niah_single"].seconds
    assert own.selection_seconds is not None
    assert own.dense_attention_seconds > 0
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
