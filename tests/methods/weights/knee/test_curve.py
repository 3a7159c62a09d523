"""Reading a curve: the library's rule, the elbow, both from windows drawn again."""

import json
import math

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.weights.knee.curve import Curve, parse_sweep
from gossamer.models.loss import WindowLosses

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)


def curve(means, shares=SHARES, spread=None, ceiling=None):
    """Windows of 10 tokens around the given means."""
    spread = torch.zeros(4).double() if spread is None else spread.double()
    losses = [
        WindowLosses(10 * (mean + spread), torch.full((4,), 10.0, dtype=torch.float64))
        for mean in torch.tensor(means, dtype=torch.float64)
    ]
    return Curve.of(shares, losses, ceiling)


def test_the_rule_by_hand():
    made = curve([2.0, 2.0, 2.018, 2.03, 4.0])
    found = made.essential(0.01)
    assert (found.sparsity, found.limit) == (0.4, pytest.approx(2.02))
    assert made.essential(0.02).sparsity == 0.6
    assert made.essential(0.0).sparsity == 0.2
    assert made.essential(10).sparsity == 0.8
    assert "tolerance 1.0%" in str(found)


def test_it_is_the_largest_even_behind_a_failure():
    found = curve([2.0, 2.1, 2.01, 2.5, 1.9]).essential(0.01)
    assert found.sparsity == 0.8
    assert found.broken == (0.2, 0.6)
    assert "20.0%, 60.0% exceed it" in str(found)


def test_nothing_within_leaves_the_dense_model():
    assert curve([2.0, 3.0, 4.0, 5.0, 6.0]).essential(0.01).sparsity == 0.0


def test_tokens_weigh_alike_whatever_their_window():
    counts = torch.tensor([30.0, 10.0], dtype=torch.float64)
    totals = torch.tensor([[30.0, 50.0], [60.0, 60.0]], dtype=torch.float64)
    losses = [WindowLosses(total, counts) for total in totals]
    assert Curve.of((0.0, 0.5), losses).losses == (2.0, 3.0)


def test_resampling_keeps_windows_paired():
    # Windows differ much, sparsities only by a constant: every resampled difference is exact.
    made = curve([2.0, 2.01, 2.02, 2.5, 3.0], spread=torch.tensor([-1.0, 0.0, 5.0, 9.0]))
    drawn = made.resampled(200)
    assert drawn.shape == (200, 5)
    assert drawn[:, 0].std() > 1
    differences = drawn - drawn[:, :1]
    expected = torch.tensor([0.0, 0.01, 0.02, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(differences, expected.expand(200, 5), atol=1e-9)
    assert torch.equal(made.resampled(5, seed=1), made.resampled(5, seed=1))


def test_the_rules_interval_reaches_what_windows_disagree_on():
    totals = torch.tensor([[20.0] * 4, [20.0] * 4, [19.9, 19.9, 20.6, 20.5], [60.0] * 4])
    made = Curve((0.0, 0.2, 0.4, 0.6), totals.double(), torch.full((4,), 10.0).double())
    found = made.essential(0.01)
    assert (found.low, found.high) == (0.2, 0.4)
    single = Curve((0.0, 0.2), totals[:2, :1].double(), torch.tensor([10.0]).double())
    assert single.essential(0.01).low is None


def test_the_elbow_leaves_out_what_is_worse_than_knowing_nothing():
    shares = tuple(i / 10 for i in range(10))
    means = [2.0, 2.1, 2.2, 2.3, 2.4, 4.4, 6.4, 8.4, 30.0, 8.5]
    capped, whole = curve(means, shares, ceiling=8.5), curve(means, shares)
    assert capped.usable == 8
    assert capped.elbow().sparsity == pytest.approx(0.4, abs=1e-3)
    assert capped.elbow().after == pytest.approx(20, rel=0.01)
    assert whole.usable == 10
    assert whole.elbow().after > 25
    # A dense model beyond the ceiling makes it meaningless.
    assert curve([9.0, 9.1, 9.2, 9.5, 11.0], ceiling=8.5).usable == 5


def test_losses_that_are_no_number_end_the_curve():
    made = curve([2.0, 2.1, 2.2, math.inf, math.nan])
    assert made.usable == 3
    assert made.elbow() is None
    assert made.essential(0.11).sparsity == 0.4
    plain = made.to_dict()
    json.dumps(plain, allow_nan=False)
    assert [point["loss"] for point in plain["points"]][3:] == [None, None]
    assert "no elbow: 3 points" in made.sentences()[1]


def test_the_plain_form_carries_both_answers():
    made = curve([2.0, 2.0, 2.0, 3.0, 4.0], spread=torch.tensor([0.0, 0.1, 0.2, 0.3]))
    plain = made.to_dict(0.05)
    json.dumps(plain, allow_nan=False)
    assert plain["essential"]["sparsity"] == 0.4
    assert plain["essential"]["tolerance"] == 0.05
    assert plain["elbow"]["sparsity"] == pytest.approx(0.4, abs=0.01)
    assert plain["elbow"]["low"] <= plain["elbow"]["sparsity"] <= plain["elbow"]["high"]
    assert plain["windows"] == 4
    assert plain["tokens"] == 40


@pytest.mark.parametrize(
    ("shares", "rows", "message"),
    [
        ((0.1, 0.2), 2, "begins with the dense model"),
        ((), 0, "begins with the dense model"),
        ((0.0, 0.2, 0.2), 3, "none twice"),
        ((0.0, 0.2), 3, "need losses of that shape"),
    ],
)
def test_impossible_curves_are_refused(shares, rows, message):
    with pytest.raises(GossamerError, match=message):
        Curve(shares, torch.ones(rows, 2), torch.ones(2))


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, "much"])
def test_impossible_tolerances_are_refused(tolerance):
    with pytest.raises(GossamerError, match="tolerance"):
        curve([2.0] * 5).essential(tolerance)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("0.2:0.8:0.2", (0.2, 0.4, 0.6, 0.8)),
        ("0.1:0.35:0.1", (0.1, 0.2, 0.3)),
        ("0.5:0.5:0.1", (0.5,)),
        (" 0.3, 0.5,0.9 ", (0.3, 0.5, 0.9)),
        ("0.3 0.5", (0.3, 0.5)),
        ("0.7", (0.7,)),
    ],
)
def test_sweeps_in_text(text, shares):
    assert parse_sweep(text) == shares


def test_the_usual_sweep_has_nineteen_clean_points():
    assert parse_sweep("0.05:0.95:0.05") == tuple(round(i / 20, 2) for i in range(1, 20))


@pytest.mark.parametrize(
    "text",
    ["", "x", "0.1:0.5", "0.5:0.1:0.1", "0.1:0.5:0", "0.1:0.5:-0.1", "0:0.5:0.1", "0.5:1:0.1",
     "0.5,0.3", "0.1:0.9:1e-9", "nan:0.5:0.1", "0.3,0.3", "0.1:inf:0.1", 0.5, "1,2:3"],
)  # fmt: skip
def test_impossible_sweeps_are_refused(text):
    with pytest.raises(GossamerError, match="sweep is"):
        parse_sweep(text)
