import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from gossamer.core import GossamerError
from gossamer.methods.features.concepts.densities import Densities, separability

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def rows(*units):
    return torch.tensor(units).T


def test_a_unit_of_one_concept_separates_and_a_constant_does_not():
    values = rows([1.0, 2, 3, 4, 0, 0, 0, 0], [1.0] * 8, [0.0] * 8)
    assert Densities.of(values, LABELS).divergence().tolist() == pytest.approx([1, 0, 0])


def test_zero_is_an_outcome_of_its_own():
    # With zero in the first bin both concepts would look alike.
    values = rows([0.0, 0, 0, 0, 0.001, 0.001, 0.001, 10], [0.5, 0, 0, 0, 1, 1, 1, 1])
    found = Densities.of(values, LABELS, bins=2)
    assert found.counts[0].tolist() == [[4, 0, 0], [0, 3, 1]]
    assert found.divergence()[0].item() == pytest.approx(1)


def test_divergence_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 3, generator=generator).relu()
    labels = torch.randint(2, (300,), generator=generator)
    found = Densities.of(values, labels, bins=6)
    given = found.given().double()
    for unit in range(3):
        wanted = jensenshannon(given[unit, 0], given[unit, 1], base=2) ** 2
        assert found.divergence()[unit].item() == pytest.approx(wanted, abs=1e-6)


def test_three_concepts_apart_reach_one():
    values = torch.tensor([[1.0], [2], [3], [1], [2], [3]])
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert separability(values, labels, permutations=0).item() == pytest.approx(1)


def test_permuted_labels_separate_nothing():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 8, generator=generator)
    labels = torch.randint(4, (400,), generator=generator)
    # Sixteen bins of a hundred rows differ by chance; that much is taken off.
    assert Densities.of(values, labels).divergence().mean() > 0.02
    assert separability(values, labels).square().mean() < 0.005


def test_chance_follows_bayes():
    values = rows([0.0, 0, 1, 1, 0, 1, 1, 1])
    chance = Densities.of(values, LABELS, bins=1).chance(1)
    # One of three zeros and three of five ones are of the second concept; half a row is added.
    assert chance[0].tolist() == pytest.approx([(1 + 0.25) / 3.5, (3 + 0.25) / 5.5])


def test_posterior_law_silences_what_speaks_for_the_concept():
    values = rows([1.0, 1, 1, 1, 5, 5, 5, 5])
    law = Densities.of(values, LABELS, bins=4).posterior(1, torch.tensor([0]))
    new = law(torch.tensor([[1.0], [5.0]]), 1.0, torch.ones(2, 1))
    assert new[0].item() > 0.9
    assert new[1].item() < 0.6


def test_within_law_follows_mean_and_deviation():
    values = rows([0.0, 9, 9, 9, 0, 1, 2, 3])
    law = Densities.of(values, LABELS).within(1, torch.tensor([0]), tau=1.0)
    spread = math.sqrt(2 / 3)
    assert law.low.item() == pytest.approx(2 - spread)
    assert law.high.item() == pytest.approx(2 + spread)


@pytest.mark.parametrize("labels", [torch.zeros(8).long(), LABELS * 2])
def test_concepts_without_rows_are_refused(labels):
    with pytest.raises(GossamerError, match="two concepts"):
        Densities.of(torch.ones(8, 1), labels)
