import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from gossamer.core import GossamerError
from gossamer.methods.features.probing.folds import auc, balanced, folds, validation_auc


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_is_scikit_learns_with_ties(pairs):
    scores = torch.tensor([float(s) for s, _ in pairs])
    labels = torch.tensor([y for _, y in pairs])
    if labels.all() or not labels.any():
        with pytest.raises(GossamerError, match="give both"):
            auc(scores, labels)
        return
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_few_rows_hold_out_every_pair_once():
    labels = torch.tensor([True, False, False, True, False])
    held = folds(labels, 0)
    assert held.shape == (6, 5)
    assert bool((held.sum(1) == 2).all())
    assert bool((held[:, labels].sum(1) == 1).all())
    assert len({tuple(row.tolist()) for row in held}) == 6


def test_some_rows_make_six_disjoint_folds_and_rare_classes_fewer():
    labels = torch.arange(60) % 2 == 0
    held = folds(labels, 0)
    assert len(held) == 6
    assert bool((held.sum(0) == 1).all())
    rare = torch.arange(60) < 3
    assert len(folds(rare, 0)) == 3
    assert all(bool(h[rare].any()) and bool(h[~rare].any()) for h in folds(rare, 0))


def test_many_rows_hold_out_a_fifth_at_most_a_hundred():
    assert int(folds(torch.arange(200) % 2 == 0, 0).sum()) == 40
    assert int(folds(torch.arange(1000) % 2 == 0, 0).sum()) == 100


def test_a_single_positive_leaves_nothing_to_validate_by():
    held = folds(torch.tensor([True, False, False]), 0)
    assert held.shape == (0, 3)
    assert validation_auc([], torch.tensor([True, False, False]), held) == 0.5
    with pytest.raises(GossamerError, match="one class"):
        folds(torch.tensor([True, True]), 0)


def test_weights_balance_the_classes_of_what_is_left():
    labels = torch.tensor([True, True, False, False, False, False])
    held = torch.tensor([[True, False, False, False, False, True]])
    (weights,) = balanced(labels, held)
    assert weights.tolist() == pytest.approx([0, 2, 2 / 3, 2 / 3, 2 / 3, 0])
