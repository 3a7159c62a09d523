"""MoA's plan: far heads get far spans, and what a user may get wrong."""

import json

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.moa import MoA, SpanSelector, kv_heads
from gossamer.methods.attention.spans.influence import Influence
from gossamer.methods.attention.spans.plan import write_spans
from gossamer.methods.attention.spans.programme import candidates, pareto
from gossamer.models import Inputs
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

SMALL = {"block_size": 2, "sink": 1, "answer_tokens": 2, "levels": 1, "lengths": (12, 20)}


def planted(length):
    """Layer 0: both heads look near. Layer 1: the second head needs what is furthest away."""
    near = torch.zeros(length)
    near[:4] = 1.0
    far = near.clone()
    far[-length // 4 :] = 1.0
    return Influence(length, (torch.stack([near, near]), torch.stack([near, far])))


def test_the_head_that_looks_far_gets_the_whole_text():
    method, lengths = MoA(sparsity=0.5, sink=0, block_size=8), (64, 128)
    found, options = tuple(planted(n) for n in lengths), candidates(lengths, 8)
    problem = method.problem(found, options, [None, None])
    (choice, *_) = pareto(problem, 1)
    spans = method._selector(found, options, choice).spans
    for length in (64, 128, 1024):
        far = spans.at(1, length)[1]
        assert far >= length
        assert max(*spans.at(0, length), spans.at(1, length)[0]) < far
    assert (problem.densities(choice) <= 0.5).all()


def test_layers_kept_dense_count_as_dense():
    method = MoA(sparsity=0.3, sink=0, block_size=8, dense_layers=1)
    found, options = (planted(64),), candidates((64,), 8)
    problem = method.problem(found, options, [None, None])
    assert (problem.kept[:, :2] == problem.total[:, :2, None]).all()
    (choice,) = pareto(problem, 1)
    assert (problem.densities(choice) <= 0.7).all()
    assert method._selector(found, options, choice).spans.at(0, 64) == (64, 64)


def test_it_counts_what_it_keeps():
    model = tiny_model("llama")
    with MoA(sparsity=0.5, **SMALL).apply(model, random_tokens()) as work:
        selector = work.selector
        assert isinstance(selector, SpanSelector)
        report = work.report()
        model(random_tokens().input_ids)
        work.measure(random_tokens().slice(1), decode=0)
        for row, kept in zip(report.rows, work.measured, strict=True):
            assert 1 - kept.density == pytest.approx(row.sparsity, abs=2e-3)
        assert work.ran
        again = selector.spans
    # At the profiled lengths the plan removes what was asked for.
    for length in (12, 20):
        found = [
            pair
            for layer in range(2)
            for pair in [SpanSelector(again, 1).pairs(length, layer, None)]
        ]
        assert sum(k for k, _ in found) <= 0.5 * sum(t for _, t in found) + 1


def test_progress_is_told():
    told = []
    with MoA(**SMALL).apply(
        tiny_model("llama"), random_tokens(), progress=lambda *a: told.append(a)
    ):
        pass
    assert told[-1][0] == told[-1][1] == 12


def test_spans_of_a_file_need_no_data(tmp_path):
    model, path = tiny_model("llama"), tmp_path / "spans.json"
    with MoA(**SMALL).apply(model, random_tokens()) as work:
        want = model(random_tokens().input_ids).logits
        write_spans(work.selector.spans, path, repeat=2)
    with MoA(spans=str(path), sink=1, block_size=2).apply(model) as work:
        assert torch.equal(model(random_tokens().input_ids).logits, want)
        assert str(path) in str(work.report())


def test_a_file_of_another_model_is_refused(tmp_path):
    path = tmp_path / "spans.json"
    path.write_text(json.dumps({"alphas": [[0.0] * 4] * 3, "betas": [[1.0] * 4] * 3}))
    with pytest.raises(GossamerError, match="3 layers, the model has 2"):
        MoA(spans=str(path)).apply(tiny_model("llama"))


def test_inputs_need_labels():
    ids = random_tokens().input_ids
    with pytest.raises(GossamerError, match="labels"):
        MoA(**SMALL).apply(tiny_model("llama"), Inputs({"input_ids": ids}))
    labels = torch.full_like(ids, -100)
    labels[:, 10:] = 3
    with MoA(**SMALL).apply(tiny_model("llama"), Inputs({"input_ids": ids, "labels": labels})) as w:
        assert w.length == 24


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lengths": (12, 400)}, "cannot profile 400 tokens on windows of 24"),
        ({"sparsity": 0.95, **SMALL, "lengths": (12,)}, "out of reach"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_what_cannot_be_planned_is_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        MoA(**values).apply(tiny_model("llama"), random_tokens())


def test_heads_are_read_from_the_model():
    assert kv_heads(tiny_model("llama")) == [2, 2]
    assert kv_heads(tiny_model("gpt2")) == [4, 4]
