import pytest
import torch
from scipy.sparse import csr_array

from gossamer.core import GossamerError, SparseRows
from gossamer.methods.features.probing.folds import auc, folds
from gossamer.methods.features.probing.probes import (
    BASELINES,
    Components,
    Logistic,
    Neighbours,
    Rows,
    SparseProbe,
    top_latents,
)


def bed(rows=60, wide=6, latents=40, seed=0):
    """The label moves channel 0 and latent 7."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2 == 0
    x = torch.randn(rows, wide, generator=generator)
    x[:, 0] += 3 * labels
    codes = torch.randn(rows, latents, generator=generator).clamp_min(0)
    codes *= torch.rand(codes.shape, generator=generator) < 0.2
    codes[:, 7] = labels * (1 + torch.rand(rows, generator=generator))
    return Rows.of(x, SparseRows.from_dense(codes)), labels


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_find_what_moves_a_channel(name):
    rows, labels = bed()
    test, truth = bed(seed=1)
    fitted = BASELINES[name]().fit(rows, labels, folds(labels, 0), 0)
    assert auc(fitted.score(test), truth) > 0.9
    assert fitted.validation > 0.85


@pytest.mark.parametrize("name", BASELINES)
def test_no_probe_validates_on_labels_that_mean_nothing(name):
    found = []
    for seed in range(4):
        rows, _ = bed(90, seed=seed)
        labels = torch.rand(90, generator=torch.Generator().manual_seed(seed + 9)) < 0.5
        plain = Rows(rows.x[:, 1:])
        found.append(BASELINES[name]().fit(plain, labels, folds(labels, 0), 0).validation)
    # Above one half, because the best of several settings is taken.
    assert 0.35 < sum(found) / 4 < 0.68


def test_a_single_positive_can_still_be_trained_on():
    rows, _ = bed(6)
    one = torch.tensor([True, False, False, False, False, False])
    for probe in (Logistic(), Components(), Neighbours(), SparseProbe(2)):
        fitted = probe.fit(rows, one, folds(one, 0), 0)
        assert fitted.validation == 0.5
        assert torch.isfinite(fitted.score(rows)).all()


def test_top_latents_by_hand():
    codes = csr_array(torch.tensor([[4.0, 0, 1, 0], [4, 0, 0, 0], [2, 0.1, 0, 0], [2, 0, 0, 0]]))
    labels = torch.tensor([True, True, False, False])
    # Differences 2, .05, .5, 0 over the means where they fire: 3, .1, 1, and none.
    assert top_latents(codes, labels, 4).tolist() == [0, 1, 2, 3]
    louder = csr_array(codes.toarray() * [[1, 50, 1, 1]])
    assert top_latents(louder, labels, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_a_sparse_probe_reads_the_latent_that_differs(penalty):
    rows, labels = bed()
    test, truth = bed(seed=1)
    fitted = SparseProbe(3, penalty).fit(rows, labels, folds(labels, 0), 0)
    assert fitted.validation == 1
    assert auc(fitted.score(test), truth) == 1
    moved = Rows(torch.zeros_like(test.x), test.codes)
    assert torch.equal(fitted.score(moved), fitted.score(test))


def test_ranking_once_flatters_the_probe():
    """Latents chosen with the rows that validate look useful on labels that mean nothing."""
    honest, flattered = [], []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.rand(40, 400, generator=generator)
        codes *= torch.rand(codes.shape, generator=generator) < 0.3
        rows = Rows.of(torch.zeros(40, 1), SparseRows.from_dense(codes))
        labels = torch.arange(40) % 2 == 0
        held = folds(labels, seed)
        honest.append(SparseProbe(8, "l2").fit(rows, labels, held, 0).validation)
        once = SparseProbe(8, "l2", rank_once=True)
        flattered.append(once.fit(rows, labels, held, 0).validation)
    assert sum(flattered) / 6 > 0.85
    assert 0.35 < sum(honest) / 6 < 0.68


def test_more_latents_than_there_are_and_unknown_penalties():
    rows, labels = bed()
    assert SparseProbe(1000, "l2").fit(rows, labels, folds(labels, 0), 0).validation > 0.9
    assert SparseProbe(5).name == "5 latents"
    with pytest.raises(GossamerError, match="l1"):
        SparseProbe(5, "l3")
    with pytest.raises(GossamerError, match="latents"):
        SparseProbe(0)
