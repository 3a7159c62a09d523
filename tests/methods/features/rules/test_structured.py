"""Structured rule: a sparse part, a low-rank part, and a penalty that keeps its value."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import Batch, Step, Structured


def stepped(rule, pre):
    batch = Batch(pre, torch.eye(pre.shape[1]), torch.zeros(pre.shape[1]))
    return Step(batch, pre, rule(pre), torch.zeros_like(pre))


def test_code_is_the_sum_and_the_shared_part_has_the_rank():
    rule, pre = Structured(12, rank=3), torch.randn(40, 12)
    sparse, shared = rule.parts(pre)
    codes = rule(pre)
    torch.testing.assert_close(codes.values, sparse + shared)
    assert int(torch.linalg.matrix_rank(shared)) == 3
    assert torch.equal(sparse > 0, pre > 0)


def test_penalty_keeps_the_value_of_l1_while_its_pull_changes():
    pre = (0.1 + torch.rand(20, 6)).requires_grad_()
    pulls = []
    for done in (100, 1000):
        rule = Structured(6, rank=2, coefficient=2.0, last_power=0.5, rows=1000)
        rule.running_rows += done - 20
        loss = rule.penalty(stepped(rule, pre))
        assert loss.item() == pytest.approx(2.0 * float(pre.detach().sum()), rel=1e-4)
        pulls.append(torch.autograd.grad(loss, pre)[0])
    small, large = pre.argmin(), pre.argmax()
    assert rule.power() == 0.5
    # Under p < 1 the pull on small values is the stronger.
    assert float(pulls[0].flatten()[small] / pulls[0].flatten()[large]) < 1.1
    assert float(pulls[1].flatten()[small] / pulls[1].flatten()[large]) > 1.5


def test_bound_is_above_the_nuclear_norm():
    rule, pre = Structured(10, rank=4, nuclear=1.0), torch.randn(50, 10)
    bound = rule.penalty(stepped(rule, pre)).item() / 50
    nuclear = torch.linalg.matrix_norm(rule.parts(pre)[1], "nuc") / 50**0.5
    assert bound >= nuclear.item()


def test_scale_folds_and_files_hold_it():
    rows = torch.randn(9, 5)
    made = Dictionary.random(5, 8, Structured(8, rank=2), seed=0).eval()
    expected = made.encode(3 * rows).to_dense() / 3
    again = Dictionary.from_tensors(made.config(), made.tensors())
    again.fold_input_scale(3.0)
    torch.testing.assert_close(again.encode(rows).to_dense(), expected, atol=1e-5, rtol=1e-5)


def test_impossible_settings_are_refused():
    for values, text in (
        ({"rank": 9}, "rank"),
        ({"last_power": 0.0}, "last_power"),
        ({"nuclear": -1.0}, "nuclear"),
    ):
        with pytest.raises(GossamerError, match=text):
            Structured(8, **values)
