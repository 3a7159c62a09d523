import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import Budget, GossamerError, Unstructured
from gossamer.methods.features.rules import (
    RULES,
    Codes,
    ReLU,
    TopK,
    combine,
    rule_from_config,
    top_rows,
)


@st.composite
def scores(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    # Few distinct values make ties at the edge the rule, not the exception.
    cells = st.lists(st.integers(-2, 2), min_size=rows * columns, max_size=rows * columns)
    keep = draw(st.integers(1, columns))
    return torch.tensor(draw(cells), dtype=torch.float32).view(rows, columns), keep


@given(scores())
def test_top_rows_keeps_what_select_keeps(case):
    score, keep = case
    indices = top_rows(score, keep)
    assert indices.shape == (len(score), keep)
    found = torch.zeros_like(score, dtype=torch.bool).scatter(1, indices, True)
    assert torch.equal(found, Unstructured("row").select(score, Budget(keep=keep)).mask())
    ranked = score.gather(1, indices)
    assert bool((ranked.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("keep", [0, 4])
def test_top_rows_refuses_impossible_counts(keep):
    with pytest.raises(GossamerError, match=f"k is {keep}"):
        top_rows(torch.zeros(2, 3), keep)


def test_nan_has_no_rank():
    with pytest.raises(GossamerError, match="NaN"):
        top_rows(torch.tensor([[1.0, float("nan"), 2.0]]), 1)


def test_topk_keeps_the_positive_ones_of_the_k_largest():
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-1.0, -2.0, 0.5, -3.0], [-1.0, -1.0, 0.0, -1.0]])
    codes = TopK(2)(pre)
    assert codes.values.tolist() == [[3.0, 2.0], [0.5, 0.0], [0.0, 0.0]]
    assert codes.indices.tolist() == [[0, 2], [2, -1], [-1, -1]]
    assert sorted(codes.fired().tolist()) == [0, 2, 2]


def test_topk_gradient_reaches_the_kept_alone():
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-4.0, -2.0, 0.5, -3.0]], requires_grad=True)
    TopK(2)(pre).values.sum().backward()
    assert pre.grad.tolist() == [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]


def test_relu_keeps_every_positive_one_and_charges_for_it():
    rule = ReLU(2.0)
    codes = rule(torch.tensor([[3.0, -1.0, 0.5]]))
    assert codes.indices.tolist() == [[0, -1, 2]]
    assert codes.values.tolist() == [[3.0, 0.0, 0.5]]
    norms = torch.tensor([1.0, 10.0, 4.0])
    assert float(rule.penalty(codes, norms)) == 2.0 * (3.0 * 1.0 + 0.5 * 4.0)


@pytest.mark.parametrize(("rows", "keep", "latents"), [(5, 3, 40), (5, 7, 8), (1, 1, 1), (0, 2, 9)])
def test_combine_and_its_gradients_match_the_dense_product(rows, keep, latents):
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(latents, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    pre = torch.randn(rows, latents, generator=generator, dtype=torch.float64)
    indices = pre.topk(keep, dim=1).indices
    values = pre.gather(1, indices).requires_grad_()
    upstream = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    out = combine(Codes(values, indices), atoms)
    got = torch.autograd.grad(out, (values, atoms), upstream)
    dense = torch.zeros(rows, latents, dtype=torch.float64).scatter(1, indices, values) @ atoms
    wanted = torch.autograd.grad(dense, (values, atoms), upstream)
    torch.testing.assert_close(out, dense)
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right)


def test_padding_adds_nothing():
    atoms = torch.arange(80.0).view(40, 2)
    codes = Codes(torch.tensor([[2.0, 0.0]]), torch.tensor([[3, -1]]))
    assert torch.equal(combine(codes, atoms), 2 * atoms[3:4])


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "8"])
def test_k_is_a_positive_whole_number(k):
    with pytest.raises(GossamerError, match="k is"):
        TopK(k)


@pytest.mark.parametrize("rule", [TopK(5), ReLU(1.0)])
def test_rules_come_back_from_their_configuration(rule):
    config = {"architecture": rule.architecture, **rule.config()}
    assert type(rule_from_config(config)) is type(rule) is RULES[rule.architecture]
    assert rule_from_config(config).budget == rule.budget


def test_unknown_architecture_offers_the_nearest():
    with pytest.raises(GossamerError, match="did you mean topk"):
        rule_from_config({"architecture": "top_k"})
