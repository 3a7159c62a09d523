"""Averages of copies: exact means, zeros that coincide or a refusal that names the difference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.core import Budget, GossamerError, Unstructured
from gossamer.methods.weights.retrain.states import (
    average,
    check_supports,
    copy_of,
    greedy,
    put_back,
    support_of,
)


def sparse(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mask.shape, generator=generator).masked_fill(~mask, 0)


def mask_of(seed, shape=(20, 30), sparsity=0.5):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(shape, generator=generator)
    return Unstructured("layer").select(score, Budget(sparsity=sparsity)).mask()


def test_a_worked_average():
    rows = ((1.0, 3.0, 3, 1.0), (2.0, -3.0, 9, 4.0), (6.0, 3.0, 1, 4.0))
    states = [
        {
            "w": torch.tensor([[a, 0.0], [b, 0.0]]),
            "n": torch.tensor(count),
            "b": torch.tensor([bias]),
        }
        for a, b, count, bias in rows
    ]
    made = average(states)
    assert made["w"].tolist() == [[3.0, 0.0], [1.0, 0.0]]
    assert made["b"].tolist() == [3.0]
    assert made["n"] == 3
    assert made["n"].dtype == torch.int64


@given(st.integers(1, 6), st.integers(0, 100), st.sampled_from([0.0, 0.3, 0.9]))
def test_the_mean_keeps_the_support(count, seed, sparsity):
    mask = mask_of(seed, sparsity=sparsity)
    states = [{"w": sparse(mask, 1000 * seed + i)} for i in range(count)]
    made = average(states, masks={"w": mask})["w"]
    expected = torch.stack([state["w"].double() for state in states]).mean(0)
    assert torch.allclose(made.double(), expected, atol=1e-6)
    assert torch.equal(made != 0, mask)


def test_sums_run_in_float32():
    # In float16 the sum of three is infinite, and small terms are lost beside large ones.
    values = [[60000.0, 2048.0], [60000.0, 1.0], [60000.0, 1.0]]
    made = average([{"w": torch.tensor([v], dtype=torch.float16)} for v in values])["w"]
    assert made.dtype == torch.float16
    assert made.tolist() == [[60000.0, torch.tensor(2050 / 3).half().item()]]
    doubles = average([{"w": torch.tensor([[1e-20 + i]], dtype=torch.float64)} for i in range(2)])
    assert doubles["w"].dtype == torch.float64


def test_what_does_not_differ_keeps_its_bits():
    third = torch.tensor([[1 / 3, -0.0]])
    made = average([{"w": third.clone()} for _ in range(3)])["w"]
    assert torch.equal(made.view(torch.int32), third.view(torch.int32))


def test_other_zeros_are_refused_by_name():
    one, two = mask_of(1), mask_of(2)
    same = {"a.weight": sparse(one, 3)}
    states = [{**same, "b.weight": sparse(m, i)} for i, m in enumerate((one, one, two))]
    with pytest.raises(GossamerError, match=r"b\.weight.*denser") as caught:
        average(states, ["first", "second", "third"])
    assert "third" in str(caught.value)
    both = support_of(states, "b.weight")
    assert both.float().mean() > 0.7
    differ = int((~one & two).sum())
    assert f"{differ:,} of the 300 zeros" in str(caught.value)


def test_a_dense_copy_among_sparse_ones_is_refused():
    mask = mask_of(1)
    states = [{"w": sparse(mask, 1)}, {"w": torch.ones(20, 30)}]
    with pytest.raises(GossamerError, match="300 of the 300 zeros of copy 1"):
        check_supports(states)


def test_a_sparser_copy_is_refused():
    mask = mask_of(1)
    states = [{"w": sparse(mask, 1)}, {"w": sparse(mask & mask_of(3), 1)}]
    with pytest.raises(GossamerError, match="zeros of copy 2 are no zeros .*such as copy 1"):
        check_supports(states)


def test_a_kept_weight_may_happen_to_be_zero():
    mask = mask_of(1, shape=(100, 200))
    states = [{"w": sparse(mask, i)} for i in range(2)]
    first = mask.nonzero()[0]
    states[0]["w"][first[0], first[1]] = 0.0
    found = check_supports(states)
    assert torch.equal(found["w"], mask)


def test_dense_matrices_and_vectors_are_not_sparse():
    states = [{"w": torch.randn(40, 40), "b": torch.tensor([float(i), 0.0])} for i in range(2)]
    states[0]["w"][0, 0] = 0.0
    assert check_supports(states) == {}
    average(states)


def test_masks_must_hold_in_every_copy():
    mask = mask_of(1)
    states = [{"w": sparse(mask, i)} for i in range(2)]
    assert torch.equal(check_supports(states, masks={"w": mask})["w"], mask)
    states[1]["w"][~mask] = 1.0
    with pytest.raises(GossamerError, match="w: 300 weights of copy 2 lie outside"):
        check_supports(states, masks={"w": mask})
    with pytest.raises(GossamerError, match="the masks name v"):
        check_supports(states, masks={"v": mask})
    with pytest.raises(GossamerError, match="the mask of w has shape"):
        check_supports(states, masks={"w": mask.T})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"v": torch.ones(2, 2)}, "copy 1 holds bias, copy 2 does not|holds v"),
        ({"w": torch.ones(2, 3), "bias": torch.ones(2)}, r"w has shape \(2, 2\) in copy 1"),
    ],
)
def test_other_networks_are_refused(other, message):
    with pytest.raises(GossamerError, match=message):
        average([{"w": torch.ones(2, 2), "bias": torch.ones(2)}, other])


def test_nothing_is_refused():
    with pytest.raises(GossamerError, match="nothing to average"):
        average([])


def test_greedy_takes_what_helps():
    # The score is minus the distance to 0: copies 2 and 0 cancel, copy 1 would spoil it.
    values = [[-2.0], [5.0], [1.0]]
    states = [{"w": torch.tensor(v)} for v in values]
    found = greedy(states, lambda state: -abs(float(state["w"])))
    assert found.chosen == (2, 0)
    assert float(found.state["w"]) == -0.5
    assert found.score == -0.5


def test_greedy_is_never_worse_than_the_best():
    states = [{"w": torch.tensor([float(v)])} for v in (3, 1, 2)]
    found = greedy(states, lambda state: -abs(float(state["w"])), scores=[-3.0, -1.0, -2.0])
    assert found.chosen == (1,)
    assert found.score == -1.0


def test_copies_go_back_to_the_bit():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))
    net[2].weight = nn.Parameter(net[0].weight.T.detach().clone())
    held = copy_of(net)
    assert {"0.weight", "1.running_mean", "1.num_batches_tracked"} <= held.keys()
    net(torch.randn(5, 3))
    with torch.no_grad():
        net[0].weight.zero_()
    put_back(net, held)
    for name, value in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
        assert torch.equal(value, held[name]), name
    assert held["1.num_batches_tracked"] == 0
