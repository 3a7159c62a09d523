"""Exchange: worked masks, and counts that never change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import NM, Block, Budget, GossamerError, Unstructured
from gossamer.core.exchange import grow, survivors, survivors_by_sign

LAYER = Unstructured("layer")


def test_the_smallest_kept_weights_go():
    weight = torch.tensor([[4.0, -1.0, 0.0, 9.0], [3.0, -2.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    left = survivors(weight, mask, 0.5, LAYER)
    assert left.tolist() == [[True, False, False, False], [True, False, False, False]]


def test_growth_fills_up_with_the_largest_scores_just_dropped_ones_included():
    left = torch.tensor([[True, False, False, False]])
    score = torch.tensor([[0.0, 5.0, 1.0, 2.0]])
    assert grow(left, score, LAYER, Budget(keep=3)).tolist() == [[True, True, False, True]]


def test_a_dense_layer_exchanges_nothing():
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert survivors(torch.randn(3, 4), mask, 0.5, LAYER).all()
    assert survivors_by_sign(torch.randn(3, 4), mask, 0.5).all()


def test_signs_lose_their_share_apart():
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, -0.1, -0.2] + [0.0] * 4)
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    left = survivors_by_sign(weight, mask, 0.5)
    # By size alone -0.1, -0.2 and 1 would go, and no negative weight stay.
    assert left.tolist() == [False, False, True, True, False, True] + [False] * 4


def test_groups_fill_up_inside():
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0, 8.0, 9.0, 0.0, 0.0]])
    mask = weight != 0
    left = survivors(weight, mask, 0.5, NM(2, 4))
    assert left.tolist() == [[False] * 4 + [True, True, False, False]]
    score = torch.tensor([[0.0, 1.0, 3.0, 2.0, 0.0, 0.0, 99.0, 99.0]])
    new = grow(left, score, NM(2, 4), Budget(keep=2))
    assert new.tolist() == [[False, False, True, True, True, True, False, False]]


def test_blocks_go_and_grow_whole():
    weight = torch.zeros(4, 4)
    weight[:2, :2], weight[2:, 2:] = 1.0, 2.0
    left = survivors(weight, weight != 0, 0.5, Block(2, 2))
    assert left.sum() == 4
    assert left[2:, 2:].all()
    score = torch.zeros(4, 4)
    score[:2, 2:] = 1.0
    new = grow(left, score, Block(2, 2), Budget(keep=2))
    assert new[:2, 2:].all()
    assert new.sum() == 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_rank_nothing_are_refused(bad):
    score = torch.tensor([0.0, bad])
    with pytest.raises(GossamerError, match="1 of 2 growth scores"):
        grow(torch.tensor([True, False]), score, LAYER, Budget(keep=1))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
    rule=st.sampled_from(["layer", "row", "nm", "block"]),
    by_sign=st.booleans(),
)
def test_no_group_changes_its_count(seed, share, rule, by_sign):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 12, generator=generator)
    pattern, keep, groups = {
        "layer": (LAYER, 29, lambda m: m.sum()),
        "row": (Unstructured("row"), 5, lambda m: m.sum(1)),
        "nm": (NM(1, 4), 1, lambda m: m.view(-1, 4).sum(1)),
        "block": (Block(2, 3), 6, lambda m: m.view(4, 2, 4, 3).all(3).all(1).sum()),
    }[rule]
    budget = Budget(keep=keep)
    mask = pattern.select(torch.rand(8, 12, generator=generator), budget).mask()
    if by_sign and rule != "block":
        left = survivors_by_sign(weight, mask, share)
    else:
        left = survivors(weight, mask, share, pattern)
    assert not (left & ~mask).any()
    new = grow(left, torch.rand(8, 12, generator=generator), pattern, budget)
    assert not (left & ~new).any()
    assert torch.equal(groups(new), groups(mask))
    assert new.sum() == mask.sum()
