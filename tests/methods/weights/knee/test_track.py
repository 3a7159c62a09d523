"""Shares of small weights over checkpoints, and where they jump."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.weights.knee.track import (
    abrupt_sparsification,
    largest_jump,
    small_fraction,
)
from gossamer.models import find_sites
from tests.models.tiny import tiny_model


def test_a_worked_share():
    # Standard deviation 2 in the first matrix: 0.5 % of it is 0.01.
    state = {
        "a": torch.tensor([[2.0, -2.0], [2.0, -2.0]]),
        "b": torch.tensor([[0.001, 0.2], [-0.0001, 1.0]]),
        "norm": torch.zeros(5),
        "steps": torch.zeros(2, 2, dtype=torch.int64),
    }
    assert small_fraction(state, 0.005, relative=False) == 2 / 8
    assert small_fraction(state, 0.001, relative=False) == 1 / 8
    deviation = float(state["b"].std(correction=0))
    assert small_fraction(state, 0.1 / deviation) == 2 / 8


def test_rescaling_a_layer_changes_nothing_but_absolute_bounds():
    model = tiny_model("gpt2")
    before = small_fraction(model, 0.1)
    absolute = small_fraction(model, 0.01, relative=False)
    site = find_sites(model).sites[0]
    site.write(model, site.weight(model) * 100)
    assert small_fraction(model, 0.1) == pytest.approx(before, abs=1e-4)
    assert small_fraction(model, 0.01, relative=False) < absolute
    # 8 % of a normal distribution lie within a tenth of its standard deviation.
    assert before == pytest.approx(0.0797, abs=0.01)


def test_embeddings_of_a_model_do_not_count():
    model = tiny_model("llama")
    before = small_fraction(model, 0.1)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert small_fraction(model, 0.1) == before


def test_the_jump_is_found():
    jump = largest_jump([0.10, 0.12, 0.11, 0.40, 0.43])
    assert jump.index == 2
    assert jump.height == pytest.approx(0.29)
    assert jump.typical == pytest.approx(0.02)
    assert "between checkpoints 2 and 3" in str(jump)
    assert largest_jump([0.5, 0.4]).height == pytest.approx(-0.1)
    assert largest_jump([0.0, 0.5, 1.0]).index == 0


def test_a_training_that_sparsifies_abruptly():
    def checkpoints():
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(50, 50, generator=generator)
        for step in range(6):
            if step == 4:
                weight = torch.where(weight.abs() < 0.5, weight * 1e-4, weight)
            yield {"w": weight + 1e-3 * torch.randn(50, 50, generator=generator)}

    jump = abrupt_sparsification(checkpoints(), tau=0.01)
    assert jump.index == 3
    assert jump.height > 0.3
    assert jump.typical < 0.02


def test_what_cannot_be_tracked_is_refused():
    with pytest.raises(GossamerError, match="at least two"):
        largest_jump([0.5])
    for tau in (0, -1, float("nan"), "x"):
        with pytest.raises(GossamerError, match="tau"):
            small_fraction({"w": torch.ones(2, 2)}, tau)
    with pytest.raises(GossamerError, match="no matrix"):
        small_fraction({"b": torch.ones(2)})
