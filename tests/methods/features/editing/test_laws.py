import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.editing import Affine, Posterior, Within
from gossamer.methods.features.editing.laws import LAWS, law_from

SIZE = torch.tensor([[2.0], [3.0]])
VALUES = torch.tensor([[1.0, -2.0, 0.0], [4.0, 0.5, 3.0]])
POSTERIOR = Posterior(
    torch.tensor([0.0, 0.0]),
    torch.tensor([1.0, 2.0]),
    torch.tensor([[0.25, 0.0, 1.0], [0.5, 0.1, 0.9]]),
)
EXAMPLES = [
    Affine(torch.tensor([2.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, -1.0])),
    Affine.added(torch.ones(3), relative=True),
    Within(torch.zeros(3), torch.ones(3)),
    Posterior(torch.zeros(3), torch.ones(3), torch.full((3, 4), 0.5)),
]


def test_clamping_goes_part_of_the_way():
    law = Affine.clamp(torch.tensor([5.0, 0.0, 1.0]))
    assert law(VALUES, 1.0, SIZE).tolist() == [[5, 0, 1], [5, 0, 1]]
    assert law(VALUES, 0.5, SIZE).tolist() == [[3, -1, 0.5], [4.5, 0.25, 2]]


def test_scaling_and_adding():
    assert Affine.scaled(torch.tensor([0.0, 2.0, 3.0]))(VALUES, 1.0, SIZE).tolist() == [
        [0, -4, 0],
        [0, 1, 9],
    ]
    added = Affine.added(torch.tensor([1.0, 0.0, 0.0]))
    assert added(VALUES, 3.0, SIZE)[:, 0].tolist() == [4, 7]
    assert added.changes == 1


def test_a_relative_shift_follows_the_row():
    law = Affine.added(torch.tensor([1.0, 0.0, 0.0]), relative=True)
    assert law(VALUES, 0.5, SIZE)[:, 0].tolist() == [2.0, 5.5]


def test_posterior_reads_zero_apart_and_clamps_to_its_bins():
    values = torch.tensor([[0.0, 0.0], [0.5, 1.0], [1.5, 3.0], [99.0, -99.0]])
    chance = [[0.25, 0.5], [0.0, 0.1], [1.0, 0.9], [1.0, 0.1]]
    assert torch.allclose(POSTERIOR.of(values), torch.tensor(chance))
    kept = values * (1 - 0.5 * torch.tensor(chance))
    assert torch.allclose(POSTERIOR(values, 0.5, torch.ones(4, 1)), kept)


def test_within_silences_usual_values_only():
    law = Within(torch.tensor([1.0]), torch.tensor([2.0]))
    values = torch.tensor([[0.9], [1.0], [1.5], [2.0], [2.1]])
    assert law(values, 1.0, torch.ones(5, 1))[:, 0].tolist() == pytest.approx([0.9, 0, 0, 0, 2.1])


@pytest.mark.parametrize("law", EXAMPLES)
def test_strength_zero_changes_nothing(law):
    assert torch.equal(law(VALUES, 0.0, SIZE), VALUES)


@pytest.mark.parametrize("law", EXAMPLES)
def test_stored_and_read_again(law):
    again = law_from(law.kind, law.tensors())
    assert torch.equal(again(VALUES, 0.7, SIZE), law(VALUES, 0.7, SIZE))
    assert law.units == again.units == 3


def test_every_law_is_in_an_example():
    assert {law.kind for law in EXAMPLES} == set(LAWS)


def test_damaged_laws_are_refused():
    with pytest.raises(GossamerError, match="unknown law"):
        law_from("afine", {})
    with pytest.raises(GossamerError, match="damaged"):
        law_from("affine", {"scale": torch.ones(1)})
    with pytest.raises(GossamerError, match="damaged"):
        law_from("within", {"low": torch.ones(1)})
