"""The planted patterns hold the mass they claim, and nothing else does."""

import pytest
import torch

from gossamer.core import GossamerError
from tests.methods.attention.planted import planted, probabilities

PATTERNED = ("sink+band", "band", "columns+diagonals", "blocks", "needle")


@pytest.mark.parametrize("repeat", [1, 2])
def test_planted_pairs_hold_the_mass(repeat):
    plant = planted(PATTERNED, 512, repeat=repeat)
    weights = probabilities(plant)
    mass = (weights * plant.kept[:, None]).sum(-1)[..., 64:].mean((1, 2))
    assert (mass > 0.97).all()
    density = plant.kept.sum((1, 2)) / (512 * 513 / 2)
    assert (density[:3] < 0.1).all()
    assert density[3] < 0.45


def test_no_pattern_serves_another_head():
    plant = planted(PATTERNED, 512)
    weights, kept = probabilities(plant)[:, :, 64:], plant.kept[:, 64:].double()
    mass = torch.einsum("grqk,hqk->gh", weights, kept) / 448
    assert mass[0, 1] < 0.8  # a band without its sinks
    assert (mass[2, [0, 1, 4]] < 0.5).all()
    assert mass[3, [0, 1, 2, 4]].max() < 0.5


def test_places_move_the_pattern_and_nothing_else():
    first, second = (planted(["columns+diagonals", "blocks"], 512, places=p) for p in (0, 1))
    assert not torch.equal(first.kept, second.kept)
    assert torch.equal(first.value, second.value)
    again = planted(["columns+diagonals", "blocks"], 512)
    assert torch.equal(first.query, again.query)
    assert torch.equal(first.key, again.key)


def test_heads_of_a_group_differ_a_little():
    plant = planted(["band"], 64, repeat=2)
    assert plant.query.shape == (1, 2, 64, 128)
    assert not torch.equal(plant.query[0, 0], plant.query[0, 1])


def test_unknown_plants_are_named():
    with pytest.raises(GossamerError, match="did you mean band"):
        planted(["bands"], 64)
