import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import kept_mass
from gossamer.methods.attention.oracle_top_k import OracleSelector, OracleTopK
from gossamer.methods.attention.oracle_top_p import CoverageSelector, OracleTopP
from gossamer.methods.attention.random_keys import RandomKeys, RandomSelector
from gossamer.methods.attention.ranked import first_ranks, true_mass
from tests.methods.attention.test_executor import make


def test_first_ranks_worked_example():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    kept = first_ranks(score, torch.tensor([[2], [3]]))
    assert kept.tolist() == [[False, True, True, False], [True, True, True, False]]


def test_true_mass_is_the_group_s_mean_probability():
    call, layout = make(1, 5, 5), Layout(1, 5, 5)
    share = true_mass(call, layout, slice(0, 5)).exp()
    torch.testing.assert_close(share.sum(-1), torch.ones(1, 2, 5))
    query = call.query.view(1, 2, 2, 5, 8)
    score = torch.einsum("bgrqd,bgkd->bgrqk", query, call.key) / 8**0.5
    want = score.masked_fill(~layout.mask()[:, :, None], -torch.inf).softmax(-1).mean(2)
    torch.testing.assert_close(share, want)


@pytest.mark.parametrize("block", [1, 4])
def test_counts_are_those_asked_for(block):
    call, layout = make(1, 32, 32), Layout(1, 32, 32)
    index = OracleSelector(block, 0.5, None).select(call, layout, 0)
    rows = torch.arange(1, 32 // block + 1)
    want = (rows * 0.5).round().clamp_min(1).long()
    assert torch.equal(index.blocks().sum(-1)[0, 1], want)
    eight = OracleSelector(block, None, 8).select(call, layout, 0)
    assert torch.equal(eight.blocks().sum(-1)[0, 0], rows.clamp_max(-(-8 // block)))


def test_no_choice_of_as_many_keys_keeps_more():
    call, layout = make(2, 24, 24), Layout(2, 24, 24)
    best = kept_mass(call, OracleSelector(1, None, 4).select(call, layout, 0)).view(2, 2)
    chance = kept_mass(call, RandomSelector(1, None, 4, 0).select(call, layout, 0)).view(2, 2)
    assert bool((best.mean(1) > chance.mean(1)).all())


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_coverage_is_reached_and_not_overshot(block, gamma):
    call, layout = make(1, 16, 16), Layout(1, 16, 16)
    index = CoverageSelector(block, gamma).select(call, layout, 0)
    mass = true_mass(call, layout, slice(0, 16)).exp()
    grid = mass.view(1, 2, 16 // block, block, 16 // block, block).sum(5).sum(3) / block
    kept = index.blocks()
    held = (grid * kept).sum(-1)
    assert bool((held >= gamma - 1e-5).all())
    smallest = grid.masked_fill(~kept | (grid == 0), torch.inf).amin(-1)
    assert bool((held - smallest < gamma).all())


def test_random_keys_hold_the_query_s_own_and_differ_by_layer_and_seed():
    call, layout = make(1, 20, 20), Layout(1, 20, 20)
    masks = [
        RandomSelector(1, 0.5, None, seed).select(call, layout, layer).mask()[0, 0]
        for seed, layer in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert all(bool(mask.diagonal().all()) for mask in masks)
    assert torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_impossible_parameters():
    with pytest.raises(GossamerError, match="one of the two"):
        OracleTopK(sparsity=0.5, budget_tokens=4)
    with pytest.raises(GossamerError, match="block_size"):
        RandomKeys(block_size=0)
    with pytest.raises(GossamerError, match="budget_tokens"):
        OracleTopK(budget_tokens=0)
    with pytest.raises(GossamerError, match="gamma"):
        OracleTopP(gamma=0.0)
