import pytest
import torch
from sklearn.metrics import roc_auc_score

from gossamer.core import GossamerError
from gossamer.methods.features.circuits.marks import area_under_curve, mark, true_heads


def test_area_agrees_with_scikit_learn_where_scores_tie():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (40,), generator=generator).double()
    truth = torch.rand(40, generator=generator) < 0.4
    assert area_under_curve(scores, truth) == pytest.approx(roc_auc_score(truth, scores))
    assert area_under_curve(torch.zeros(40), truth) == 0.5


def test_marks_count_hits():
    scores = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    truth = torch.tensor([[True, False], [False, True]])
    found = torch.tensor([[True, False], [True, False]])
    marks = mark(scores, truth, found)
    assert (marks.precision, marks.recall, marks.auc) == (0.5, 0.5, 0.5)


def test_true_heads_cost_a_tenth_of_the_worst():
    effects = torch.tensor([2.0, 0.21, 0.19, -3.0])
    assert true_heads(effects).tolist() == [True, True, False, False]


def test_a_truth_of_one_kind_ranks_nothing():
    with pytest.raises(GossamerError, match="0 of 3 heads matter"):
        area_under_curve(torch.rand(3), torch.zeros(3, dtype=torch.bool))
