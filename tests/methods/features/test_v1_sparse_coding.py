"""V1 sparse coding: hidden atoms are found, and the coder is given back."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.measure import matched_cosine
from gossamer.methods.features.v1_sparse_coding import V1SparseCoding
from gossamer.methods.features.vision import PENALTIES, SparseCoder
from tests.models.patches import coder, patches

HIDDEN = torch.randn(20, 16, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_penalty_learns_to_explain_the_patches(penalty):
    model, data = coder(), patches(2000)
    kinds = {"group": 0.6, "soft": 0.3}
    method = V1SparseCoding(penalty=penalty, weight=kinds.get(penalty, 0.3), updates=100, steps=20)
    model.configure(penalty, method.weight, method.steps)
    before = float((data - model(data)).square().mean()), (model.codes(data) != 0).sum()
    with method.apply(model, data) as applied:
        after = float((data - model(data)).square().mean()), (model.codes(data) != 0).sum()
        assert after[0] < before[0]
        assert after[1] < before[1]
        torch.testing.assert_close(model.atoms.norm(dim=1), torch.ones(24))
        assert applied.report().sparsity == pytest.approx(1 - applied.figures["l0"] / 24)


def test_hidden_atoms_are_found_under_l0():
    model = coder()
    assert matched_cosine(model.atoms, HIDDEN) < 0.75
    V1SparseCoding(updates=300, steps=25).apply(model, patches(4000))
    assert matched_cosine(model.atoms, HIDDEN) > 0.9


def test_unused_atoms_restart_at_patches():
    model = coder()
    model.atoms.data[5] = torch.nn.functional.normalize(torch.ones(16), dim=0)
    data = patches(2000)
    data = data - data.mean(1, keepdim=True)
    applied = V1SparseCoding(penalty="hard", updates=60, steps=20).apply(model, data)
    assert applied.figures["unused"] == 0
    assert float(model.atoms[5].mean().abs()) < 0.2


def test_restore_gives_atoms_and_settings_back():
    model = coder()
    atoms, settings = model.atoms.clone(), (model.penalty, model.weight, model.steps)
    with V1SparseCoding(updates=3).apply(model, patches()):
        assert (model.penalty, model.weight) == ("hard", 4.0)
        assert not torch.equal(model.atoms, atoms)
    assert torch.equal(model.atoms, atoms)
    assert (model.penalty, model.weight, model.steps) == settings


def test_an_interrupt_leaves_no_trace():
    model = coder()
    atoms, penalty = model.atoms.clone(), model.penalty

    def stop(done, total, text):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        V1SparseCoding(updates=5).apply(model, patches(), progress=stop)
    assert torch.equal(model.atoms, atoms)
    assert model.penalty == penalty


def test_patches_of_the_photographs_are_the_default():
    applied = V1SparseCoding(updates=2, steps=5).apply(SparseCoder(36, 40))
    assert 0 < applied.figures["l0"] <= 40


def test_what_it_cannot_take_is_refused():
    with pytest.raises(GossamerError, match="SparseCoder"):
        V1SparseCoding().apply(torch.nn.Linear(2, 2), patches())
    with pytest.raises(GossamerError, match=r"\(N, 16\)"):
        V1SparseCoding().apply(coder(), torch.zeros(3, 9))
    with pytest.raises(GossamerError, match="no square"):
        V1SparseCoding().apply(SparseCoder(15, 20))
    with pytest.raises(GossamerError, match="penalty"):
        V1SparseCoding(penalty="hrad")
    with pytest.raises(GossamerError, match="lr"):
        V1SparseCoding(lr=1.5)
