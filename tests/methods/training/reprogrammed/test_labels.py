"""Label maps: counted and assigned by hand, one to one, and never worse than they must be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.training.reprogrammed.labels import greedy_map, votes


def test_first_choices_are_counted_by_target_class():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 5.0], [9.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    counts = votes(logits, torch.tensor([0, 1, 0, 1]), 3)
    assert counts.tolist() == [[2, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_probabilities_are_added_up_by_target_class():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.6, 0.4, 0.0]]))
    counts = votes(logits, torch.tensor([1, 0, 1]), 2, by_probability=True)
    want = torch.tensor([[0.1, 0.1, 0.8], [1.1, 0.7, 0.2]], dtype=torch.float64)
    assert torch.allclose(counts, want, atol=1e-6)


def test_the_largest_count_goes_first_not_the_first_class():
    # Class 0 would take source 1 with 5, but class 2 has 9 there and goes first.
    counts = torch.tensor([[4.0, 5.0, 1.0], [4.0, 0.0, 2.0], [8.0, 9.0, 0.0]])
    assert greedy_map(counts).tolist() == [0, 2, 1]
    # The best sum of an assignment would be another; greedy it is.
    assert greedy_map(torch.tensor([[10.0, 9.0], [9.0, 0.0]])).tolist() == [0, 1]


def test_equal_counts_go_to_the_lower_class():
    assert greedy_map(torch.zeros(2, 3)).tolist() == [0, 1]
    assert greedy_map(torch.tensor([[1.0, 1.0], [1.0, 1.0]])).tolist() == [0, 1]
    assert greedy_map(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 3.0]])).tolist() == [0, 2]


def test_more_classes_than_the_network_has():
    with pytest.raises(GossamerError, match="the task has 3 classes, the frozen network 2"):
        greedy_map(torch.zeros(3, 2))


@given(st.integers(1, 6), st.integers(0, 6), st.randoms(use_true_random=False))
def test_one_to_one_and_greedy(targets, more, random):
    sources = targets + more
    rows = [[random.randint(0, 4) for _ in range(sources)] for _ in range(targets)]
    counts = torch.tensor(rows, dtype=torch.float64)
    before = counts.clone()
    found = greedy_map(counts).tolist()
    assert torch.equal(counts, before)
    assert len(set(found)) == targets
    assert all(0 <= source < sources for source in found)
    # No free pair beats a chosen one: whoever has more there gave way to somebody larger still.
    given = {t: rows[t][s] for t, s in enumerate(found)}
    holder = {s: t for t, s in enumerate(found)}
    for target in range(targets):
        for source in range(sources):
            other = given[holder[source]] if source in holder else -1
            assert rows[target][source] <= max(given[target], other)


@given(st.permutations(range(5)))
def test_a_network_that_agrees_with_the_task_up_to_names(order):
    logits = 3.0 * torch.eye(5)[list(order)].repeat(4, 1)
    labels = torch.arange(5).repeat(4)
    assert greedy_map(votes(logits, labels, 5)).tolist() == list(order)
