"""The masked linear map against autograd, in fp64; what it keeps for the backward pass."""

import pytest
import torch
from torch.nn.functional import linear

from gossamer.methods.tuning.masked.linear import Scales, Scores, masked_linear, scores, updated


def case(out=5, into=7, rank=2, score_rank=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    trained = {
        "u": draw(out, rank),
        "v": draw(rank, into),
        "a": draw(out, score_rank),
        "b": draw(score_rank, into),
        "row": draw(out),
        "column": draw(into),
    }
    weight, bias, x = draw(out, into), draw(out), draw(2, 3, into)
    mask = torch.rand(out, into, generator=generator) < 0.4
    return x, weight, bias, mask, {k: v.requires_grad_() for k, v in trained.items()}


def plain(x, weight, bias, mask, u, v, a, b, row, column, scales):
    """The same with autograd's own operations: the mask is a step whose slope is taken as 1."""
    whole = weight + scales.beta * u @ v
    score = whole.abs()
    if a is not None:
        score = score + scales.alpha1 * a @ b
    if row is not None:
        score = score + scales.alpha2 * (row[:, None] + column[None])
    straight = mask.to(score) + score - score.detach()
    return linear(x, straight * whole, bias)


@pytest.mark.parametrize("left_out", [(), ("a", "b"), ("row", "column")])
def test_values_and_gradients_are_those_of_a_straight_through_mask(left_out):
    scales = Scales(beta=0.7, alpha1=1.3, alpha2=0.4)
    x, weight, bias, mask, trained = case()
    trained = {k: None if k in left_out else v for k, v in trained.items()}
    x.requires_grad_()
    wanted = plain(x, weight, bias, mask, **trained, scales=scales)
    pull = torch.randn_like(wanted)
    wants = [x, *(v for v in trained.values() if v is not None)]
    right = torch.autograd.grad((wanted * pull).sum(), wants)
    u, v, *others = trained.values()
    got = masked_linear(x, weight, bias, mask, u, v, Scores(*others), scales)
    found = torch.autograd.grad((got * pull).sum(), wants)
    assert torch.allclose(got, wanted, atol=1e-12)
    for mine, theirs in zip(found, right, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-11)


def test_a_removed_weight_still_teaches_its_score_and_its_update():
    # y = m (w + u v) x with m = 0: dL/dm = w x = 6 reaches the score's parts, and through |w + u v|
    # the update: d/dv = u * 6 * sign(w) = 12.
    x, weight = torch.tensor([[3.0]]), torch.tensor([[2.0]])
    mask = torch.zeros(1, 1, dtype=torch.bool)
    u, v = torch.tensor([[2.0]]), torch.zeros(1, 1, requires_grad=True)
    row, column = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    parts = Scores(row=row, column=column)
    y = masked_linear(x, weight, None, mask, u, v, parts, Scales())
    assert y.item() == 0
    y.sum().backward()
    assert (v.grad.item(), row.grad.item(), column.grad.item()) == (12.0, 6.0, 6.0)


def test_scores_of_a_worked_array():
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    u, v = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 4.0]])
    parts = Scores(
        a=torch.tensor([[1.0], [2.0]]),
        b=torch.tensor([[3.0, 0.0]]),
        row=torch.tensor([10.0, 0.0]),
        column=torch.tensor([0.0, 100.0]),
    )
    found = scores(weight, u, v, parts, Scales(beta=1.0, alpha1=2.0, alpha2=0.5))
    assert found.tolist() == [[1 + 6 + 5, 2 + 0 + 5 + 50], [0.5 + 12, 50.0]]
    assert updated(weight, u, v, 0.5).tolist() == [[1.0, 0.0], [0.5, 0.0]]


def test_nothing_as_large_as_the_matrix_is_kept_but_matrix_and_mask():
    x, weight, bias, mask, trained = case(out=64, into=96, dtype=torch.float32)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    u, v, *others = trained.values()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        masked_linear(x, weight, bias, mask, u, v, Scores(*others), Scales())
    large = [t for t in kept if t.numel() >= weight.numel()]
    assert {t.data_ptr() for t in large} == {weight.data_ptr(), mask.data_ptr()}


def test_half_precision_is_rounded_once():
    x, weight, bias, mask, trained = case(out=16, into=16, dtype=torch.float32)
    u, v, *others = trained.values()
    half, x = weight.bfloat16(), x.bfloat16()
    y = masked_linear(x, half, bias.bfloat16(), mask, u, v, Scores(*others), Scales())
    whole = ((half.float() + u @ v) * mask).bfloat16()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear(x, whole, bias.bfloat16()))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in trained.values())


def test_autocast_rounds_the_product_not_the_update():
    x, weight, bias, mask, trained = case(out=16, into=16, dtype=torch.float32)
    u, v, *others = trained.values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_linear(x, weight, bias, mask, u, v, Scores(*others), Scales())
        wanted = linear(x, updated(weight, u, v, 1.0) * mask, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wanted)
    y.float().sum().backward()
    assert u.grad.isfinite().all()
    assert u.grad.any()
