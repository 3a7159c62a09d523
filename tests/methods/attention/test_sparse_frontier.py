"""The ladder stops where the paired test says so, and the model ends where the ladder ended."""

import pytest
import torch

from gossamer import methods
from gossamer.core import GossamerError
from gossamer.methods.attention.sparse_frontier import SparseFrontier
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def of(**values):
    return SparseFrontier(**{"base": "streaming_llm:sink=1", **values})


def test_a_generous_margin_climbs_to_the_top_and_a_tiny_one_stays_full():
    model, data = tiny_model("llama"), random_tokens()
    with of(sweep="0.25,0.5,0.75", margin=1e5).apply(model, data) as work:
        assert work.report().sparsity == pytest.approx(0.75, abs=0.05)
        assert sum("passes" in note for note in work.report().notes) == 3
    ids = data.input_ids
    with torch.no_grad():
        dense = model(ids).logits
        with of(sweep="0.5,0.9", margin=1e-9).apply(model, data) as work:
            assert torch.allclose(model(ids).logits, dense, atol=1e-5)
            notes = " ".join(work.report().notes)
    assert "fails" in notes
    assert "attention stays full" in notes
    # The ladder is left at the first failure.
    assert "at 0.9" not in notes


def test_it_ends_as_its_base_at_the_rung_found():
    model, data = tiny_model("llama"), random_tokens()
    with torch.no_grad():
        with methods.make("streaming_llm", sink=1, sparsity=0.5).apply(model, data):
            alone = model(data.input_ids).logits
        with of(sweep="0.25,0.5", margin=1e5).apply(model, data):
            found = model(data.input_ids).logits
    assert torch.equal(alone, found)


def test_climbing_tells_the_losses_and_leaves_no_trace():
    model, data = tiny_model("llama"), random_tokens()
    with torch.no_grad():
        before = model(data.input_ids).logits
        climbed = of(sweep="0.25,0.9", margin=1e5).climb(model, data)
        assert torch.equal(model(data.input_ids).logits, before)
    assert [rung for rung, _ in climbed] == [0.25, 0.9]
    assert all(pair.samples == 6 for _, pair in climbed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sweep": "0.5,0.25"}, "rise"),
        ({"sweep": ""}, "give sparsities"),
        ({"sweep": "1.5"}, "sweep"),
        ({"margin": 0.0}, "above 0"),
        ({"level": 2.0}, "between 0 and 1"),
        ({"base": "quest"}, "decoding only"),
        ({"base": "wanda"}, "no attention method"),
        ({"base": "flexprefill"}, "no attention method"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        of(**values)


def test_it_needs_data():
    with pytest.raises(GossamerError, match="measures the loss on data"):
        of().apply(tiny_model("llama"))
