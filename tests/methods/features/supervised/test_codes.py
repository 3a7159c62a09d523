import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.supervised.codes import SupervisedCodes

GENERATOR = torch.Generator().manual_seed(0)
COLOUR = torch.randint(3, (200,), generator=GENERATOR)
SHAPE = torch.where(torch.rand(200, generator=GENERATOR) < 0.7, COLOUR % 2, 1 - COLOUR % 2)
ATOMS = torch.randn(5, 6, generator=GENERATOR)
ROWS = ATOMS[COLOUR] + ATOMS[3 + SHAPE]
TRUTH = {"colour": COLOUR, "shape": SHAPE}


def test_least_squares_finds_sums_of_atoms_exactly():
    codes = SupervisedCodes.fit(ROWS, TRUTH)
    assert torch.allclose(codes.reconstruct(TRUTH), ROWS, atol=1e-5)
    swapped = ROWS + codes.edit("colour", COLOUR, torch.tensor(2))
    assert torch.allclose(swapped, ATOMS[2] + ATOMS[3 + SHAPE], atol=1e-5)


def test_mean_codes_are_means_and_blur_attributes_that_go_together():
    codes = SupervisedCodes.fit(ROWS, TRUTH, "mean")
    wanted = ROWS[COLOUR == 1].mean(0) - ROWS.mean(0)
    assert torch.allclose(codes.atoms["colour"][1], wanted, atol=1e-5)
    assert (codes.reconstruct(TRUTH) - ROWS).abs().max() > 0.1


def test_without_a_source_the_atom_is_added():
    codes = SupervisedCodes.fit(ROWS, TRUTH)
    assert torch.equal(codes.edit("shape", None, 1), codes.atoms["shape"][1])


def test_bad_input():
    with pytest.raises(GossamerError, match="no attribute"):
        SupervisedCodes.fit(ROWS, {})
    with pytest.raises(GossamerError, match="did you mean colour"):
        SupervisedCodes.fit(ROWS, TRUTH).edit("color", 0, 1)
