import pytest
import torch

from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.measure import matched_cosine
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.toy import Heard, Hierarchy, Shared, Superposition


def test_toy_rows_have_the_promised_statistics():
    bed = Superposition(d_in=16, atoms=48, active=4.0, noise=0.0)
    assert float(bed.rates().sum()) == pytest.approx(4.0, rel=1e-4)
    assert float(bed.rates().max()) <= 1.0
    torch.testing.assert_close(bed.true_atoms().norm(dim=1), torch.ones(48))
    first, again = next(bed.batches(32, seed=1)), next(bed.batches(32, seed=1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next(bed.batches(32, seed=2)))
    assert not torch.equal(Superposition(seed=1).true_atoms(), Superposition().true_atoms())


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_seeds_do_not_hand_the_answer_to_a_fresh_dictionary(seed):
    bed = Superposition(seed=seed)
    fresh = Dictionary.random(bed.d_in, 2 * bed.atoms, TopK(1), seed=seed)
    assert matched_cosine(fresh.W_dec, bed.true_atoms()) < 0.6


def test_signed_rows_have_both_signs_and_the_same_sizes():
    plain, signed = Superposition(noise=0.0), Superposition(noise=0.0, signed=True)
    codes, _ = next(signed.codes(4096, 32))
    assert float((codes[codes != 0] < 0).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(codes[codes != 0].abs().min()) >= 0.5
    assert bool((next(plain.codes(64, 32))[0] >= 0).all())


def test_orthogonal_atoms():
    atoms = Superposition(d_in=16, atoms=12, orthogonal=True).true_atoms()
    torch.testing.assert_close(atoms @ atoms.T, torch.eye(12), rtol=0, atol=1e-5)


def test_children_come_with_their_parents():
    bed = Hierarchy(parents=4, children=3, rate=0.3, child_rate=0.5)
    rows, on = next(bed.labelled(8192))
    assert rows.shape == (8192, 64)
    parent, child = on[:, :4], on[:, 4:].view(-1, 4, 3)
    assert not bool((child & ~parent[:, :, None]).any())
    assert float(parent.double().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(child[parent].double().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(next(bed.batches(16, seed=3)), next(bed.labelled(16, seed=3))[0])


def test_private_atoms_are_absent_from_the_other_site():
    bed = Shared(Superposition(d_in=16, atoms=40), private=0.1)
    owner, atoms = bed.owners(), bed.true_atoms()
    assert [int((owner == i).sum()) for i in range(3)] == [32, 4, 4]
    norms = torch.stack([part.norm(dim=1) for part in atoms.split(16, dim=1)])
    torch.testing.assert_close(norms[0], (owner != 2).float())
    torch.testing.assert_close(norms[1], (owner != 1).float())
    assert next(bed.batches(8)).shape == (8, 32)


def test_gradients_name_the_heard_atoms_that_occur():
    bed = Heard(Superposition(d_in=32, atoms=24, active=3.0, noise=0.0, orthogonal=True))
    rows = next(bed.batches(256))
    atoms = bed.bed.true_atoms()
    codes, gradient = rows[:, :32] @ atoms.T, rows[:, 32:] @ atoms.T
    assert torch.equal((gradient.abs() > 0.5)[:, 1::2], (codes.abs() > 0.1)[:, 1::2])
    assert float(gradient[:, ::2].abs().max()) < 1e-5
    assert torch.equal(rows, next(bed.batches(256)))
