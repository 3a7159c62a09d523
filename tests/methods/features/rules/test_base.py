import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import Budget, GossamerError, Unstructured
from gossamer.methods.features.rules import (
    RULES,
    AbsTopK,
    Codes,
    Gated,
    JumpReLU,
    ReLU,
    TopAFA,
    TopK,
    combine,
    rule_from_config,
    top_batch,
    top_rows,
)
from gossamer.methods.features.rules.base import pack


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


@pytest.mark.parametrize("rule", [TopK(5), ReLU(1.0), AbsTopK(3), JumpReLU(9), Gated(9), TopAFA()])
def test_rules_come_back_from_their_configuration(rule):
    config = {"architecture": rule.architecture, "d_sae": 9, **rule.config()}
    assert type(rule_from_config(config)) is type(rule) is RULES[rule.architecture]
    assert rule_from_config(config).budget == rule.budget


def test_unknown_architecture_offers_the_nearest():
    with pytest.raises(GossamerError, match="did you mean topk"):
        rule_from_config({"architecture": "top_k"})


def test_a_batch_is_one_competition_with_ties_to_the_earlier_entry():
    score = torch.tensor([[5.0, 1.0, 0.0], [4.0, 3.0, 1.0]])
    assert top_batch(score, 3).tolist() == [[True, False, False], [True, True, False]]
    assert top_batch(score, 4).tolist() == [[True, True, False], [True, True, False]]
    with pytest.raises(GossamerError, match="k is 4"):
        top_batch(score, 8)
    with pytest.raises(GossamerError, match="NaN"):
        top_batch(torch.tensor([[float("nan"), 1.0]]), 1)


def test_packed_codes_are_as_narrow_as_the_longest_row_and_differentiable():
    dense = torch.tensor([[0.0, 2.0, 0.0, 3.0], [0.0] * 4, [1.0, 0.0, 0.0, 0.0]]).requires_grad_()
    codes = pack(dense, dense.detach() > 0)
    assert codes.indices.tolist() == [[1, 3], [-1, -1], [0, -1]]
    assert codes.values.tolist() == [[2.0, 3.0], [0.0, 0.0], [1.0, 0.0]]
    (codes.values * torch.tensor([[1.0, 10.0]])).sum().backward()
    assert dense.grad.tolist() == [[0.0, 1.0, 0.0, 10.0], [0.0] * 4, [1.0, 0.0, 0.0, 0.0]]


def test_nothing_kept_decodes_to_zeros():
    codes = pack(torch.zeros(3, 9), torch.zeros(3, 9, dtype=torch.bool))
    assert torch.equal(combine(codes, torch.ones(9, 2)), torch.zeros(3, 2))
