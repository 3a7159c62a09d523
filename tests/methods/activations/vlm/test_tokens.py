"""Overlap with the core, the elbow, and the same number of tokens in every row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.methods.activations.vlm.tokens import above_elbow, keep_tokens, overlap

# Four tokens over five neurons: image, image, text, padding.
ACTIVE = torch.tensor(
    [[[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1]]], dtype=torch.bool
)
REAL = torch.tensor([[True, True, True, False]])
IMAGE = torch.tensor([[True, True, False, False]])


def test_the_core_is_what_most_real_tokens_share() -> None:
    # Votes 1 3 1 1 1: the core of two is neurons 1 and, by the tie, 0.
    assert overlap(ACTIVE, REAL, IMAGE, 2, "core").tolist() == [[2, 1, 1, 2]]


def test_the_text_reference_counts_text_tokens_only() -> None:
    assert overlap(ACTIVE, REAL, IMAGE, 3, "text").tolist() == [[1, 1, 3, 3]]


def test_the_late_reference_is_one_token() -> None:
    # Of four tokens there is no fifth-last; the last real one is text.
    assert overlap(ACTIVE, REAL, IMAGE, 2, "late").tolist() == [[1, 1, 3, 3]]
    wide = torch.cat([ACTIVE[:, :3]] + [ACTIVE[:, 2:3]] * 4 + [ACTIVE[:, :1]], 1)
    image = torch.tensor([[True, True] + [False] * 6])
    real = torch.ones_like(image)
    fifth = overlap(wide, real, image, 2, "late")
    assert fifth.tolist() == [[1, 1, 3, 3, 3, 3, 3, 1]]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([10, 1, 9, 1, 1, 1, 8, 1], [1, 0, 1, 0, 0, 0, 1, 0]),  # few high: the bend is below
        ([9, 9, 9, 9, 9, 1, 9, 2], [1, 1, 1, 1, 1, 0, 1, 0]),  # few low: the bend is above
        ([4, 4, 4, 4], [1, 1, 1, 1]),
        ([3, 2, 1, 0], [1, 1, 1, 1]),
        ([5, 1], [1, 1]),
    ],
)
def test_what_lies_before_the_elbow(scores, expected) -> None:
    assert above_elbow(torch.tensor(scores, dtype=torch.float32)).int().tolist() == expected


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_the_elbow_keeps_the_highest_and_treats_equals_alike(numbers) -> None:
    scores = torch.tensor(numbers, dtype=torch.float32)
    kept = above_elbow(scores)
    assert bool(kept[scores == scores.max()].all())
    if not bool(kept.all()):
        assert float(scores[kept].min()) > float(scores[~kept].max())


def test_rows_give_up_equally_many_and_text_stays() -> None:
    scores = torch.tensor([[0.0, 9, 1, 1, 8, 1, 0], [0.0, 9, 8, 7, 9, 1, 0]])
    image = torch.tensor([[False, True, True, True, True, True, False]] * 2)
    kept = keep_tokens(scores, image)
    # The first row could spare three tokens, the second one.
    assert kept is not None
    assert kept.tolist() == [[0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 6]]
    alone = keep_tokens(scores[:1], image[:1])
    assert alone is not None
    assert alone.tolist() == [[0, 1, 4, 6]]
    assert keep_tokens(torch.ones(1, 7), image[:1]) is None
