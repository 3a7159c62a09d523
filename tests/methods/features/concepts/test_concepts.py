"""Concepts: exact posteriors, probes that find directions, offsets and matches by hand."""

import itertools
from math import log

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.concepts import ConceptNet, concept_match, offset_product, probes


def test_prior_of_the_tree_by_hand():
    states, total = ConceptNet(concepts=3, copies=0.9).states()
    for state, value in zip(states.tolist(), total.tolist(), strict=True):
        expected = log(0.5) + sum(log(0.9 if c == state[0] else 0.1) for c in state[1:])
        assert value == pytest.approx(expected)
    assert {tuple(s) for s in states.tolist()} == set(itertools.product((False, True), repeat=3))


def test_log_odds_are_calibrated_and_rows_linear_in_them():
    net = ConceptNet(copies=0.85, noise=0.0)
    rows, odds, truth = net.rows(40_000)
    sure = odds.sigmoid()
    for low in (0.1, 0.3, 0.5, 0.7):
        at = (sure >= low) & (sure < low + 0.2)
        assert float(truth[at].float().mean()) == pytest.approx(float(sure[at].mean()), abs=0.02)
    assert int(torch.linalg.matrix_rank(rows[:200].double(), rtol=1e-5)) == net.concepts


def test_probes_and_offsets_of_separate_directions_give_the_identity():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (2000, 3), generator=generator)
    axes = torch.linalg.qr(torch.randn(10, 3, generator=generator)).Q.T
    rows = (2.0 * labels - 1) @ axes + 0.5 * torch.randn(2000, 10, generator=generator)
    weights, biases = probes(rows, labels)
    right = (rows @ weights.T + biases > 0) == labels.bool()
    assert float(right.float().mean()) > 0.95
    pairs = [(rows[:50], rows[:50] + 2 * axis) for axis in axes]
    found = offset_product(weights, pairs)
    assert found.positive == 1
    assert found.off_diagonal < 0.1
    assert found.cosine > 0.95
    turned = offset_product(weights, [(b, a) for a, b in pairs])
    assert turned.positive == 0
    assert turned.cosine == pytest.approx(-found.cosine)


def test_rows_that_say_nothing_of_a_concept_do_not_count():
    rows, labels = torch.randn(100, 4), torch.full((100, 1), -1)
    labels[:40, 0] = (rows[:40, 1] > 0).long()
    some, _ = probes(rows, labels)
    only, _ = probes(rows[:40], labels[:40])
    cosine = torch.nn.functional.cosine_similarity(some, only)
    assert float(cosine) > 0.9
    with pytest.raises(GossamerError, match="one label only"):
        probes(rows, torch.zeros(100, 1))


def test_match_is_the_best_correlation_whatever_the_scale():
    odds = torch.randn(500, 2)
    codes = torch.stack([torch.randn(500), -7 * odds[:, 1] + 3, odds[:, 0].relu()], 1)
    found = concept_match(codes, odds)
    assert found.latent.tolist() == [2, 1]
    assert float(found.best[1]) == pytest.approx(1)
    expected = torch.corrcoef(torch.stack([codes[:, 2], odds[:, 0]]))[0, 1]
    assert float(found.best[0]) == pytest.approx(float(expected), abs=1e-5)
