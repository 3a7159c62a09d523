import pytest
import torch

from gossamer.claims.base import Verdict
from gossamer.claims.features.discrete_circuits import CLAIMS
from gossamer.core import GossamerError
from gossamer.methods.features.circuits.heads import ablated, head_inputs
from gossamer.methods.features.discrete_circuits import DiscreteCircuits
from gossamer.models import templates

METHOD = DiscreteCircuits(sparsity=0.75, steps=60, latents=64)


def test_the_circuit_is_the_best_ranked_heads():
    circuit = METHOD.find(templates.load(), templates.batch("years", 10, 1))
    assert circuit.counts.shape == circuit.shares.shape == (4, 4)
    assert circuit.edges.shape == (16, 16)
    best = {(block, head) for block, head, _ in circuit.ranking()[:4]}
    assert {tuple(at) for at in circuit.heads(0.75).nonzero().tolist()} == best
    assert circuit.heads(0.0).all()
    scores = [score for *_, score in circuit.ranking()]
    assert scores == sorted(scores, reverse=True)


def test_heads_outside_the_circuit_hand_over_their_mean():
    model, shown = templates.load(), templates.batch("years", 10, 1)
    with METHOD.apply(model, shown) as applied:
        found = model(shown.ids).logits.detach()
        heads = applied.heads
        assert "attention heads" in str(applied.report())
        assert applied.report().sparsity == 0.75
    means = head_inputs(model, {"input_ids": shown.corrupted}).mean((1, 2))
    with torch.no_grad(), ablated(model, ~heads, means):
        torch.testing.assert_close(model(shown.ids).logits, found)


def test_ranking_by_counts_is_another_ranking():
    model, shown = templates.load(), templates.batch("arguments", 10, 1)
    by_share = METHOD.find(model, shown)
    by_count = DiscreteCircuits(rank="counts", steps=60, latents=64).find(model, shown)
    assert torch.equal(by_share.counts, by_count.counts)
    assert torch.equal(by_count.scores, by_count.counts)
    assert torch.equal(by_share.scores, by_share.shares)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": "codes"}, "rank is 'codes'"),
        ({"train_on": 1}, "train_on is 1"),
        ({"penalty": -1.0}, r"penalty is -1\.0"),
        ({"lr": 0.0}, r"lr is 0\.0"),
    ],
)
def test_impossible_parameters_are_refused(values, message):
    with pytest.raises(GossamerError, match=message):
        DiscreteCircuits(**values)


def test_claims_fail_where_labels_do_not_matter():
    good = {"auc": 0.9, "auc_shuffled": 0.5, "auc_means": 0.7}
    for claim in CLAIMS:
        assert claim.check([good]) is Verdict.HOLDS
        assert claim.check([good | {"auc_means": 1.0}]) is Verdict.WEAKER
        assert claim.check([good | {"auc_shuffled": 0.88}]) is Verdict.FAILS
        assert claim.check([good | {"auc": 0.5}]) is Verdict.FAILS
