import pytest
import torch

from gossamer.core import GossamerError
from gossamer.core.prox import soft
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.objective import objective
from gossamer.methods.features.rules import AbsTopK, Batch, GradientTopK, TopK


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


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "8"])
@pytest.mark.parametrize("rule", [TopK, AbsTopK, GradientTopK])
def test_k_is_a_positive_whole_number(rule, k):
    with pytest.raises(GossamerError, match="k is"):
        rule(k)


def test_abstopk_keeps_the_furthest_from_zero_with_their_sign():
    pre = torch.tensor([[3.0, -4.0, 2.0, 1.0], [-1.0, 0.0, 0.5, -3.0], [0.0, 0.0, 0.0, 0.0]])
    codes = AbsTopK(2)(pre)
    assert codes.values.tolist() == [[-4.0, 3.0], [-3.0, -1.0], [0.0, 0.0]]
    assert codes.indices[:2].tolist() == [[1, 0], [3, 0]]
    # A negative value fires: counted by its sign, latents 1 and 3 would pass for dead.
    assert sorted(codes.fired().tolist()) == [0, 0, 1, 3]


def test_opposite_values_do_not_cancel_in_what_counts_as_fired():
    codes = AbsTopK(1)(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]))
    assert float(codes.values.sum()) == 0.0
    assert codes.fired().tolist() == [0, 0]


def test_multi_topk_adds_an_eighth_of_the_error_at_four_times_k():
    made = Dictionary.random(8, 32, TopK(2, multi=True), seed=0)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def squared(k):
        wide = Dictionary.random(8, 32, TopK(k), seed=0)
        return float((x - wide(x)).square().sum())

    spread = float((x - x.mean(0)).square().sum())
    none = torch.empty(0, dtype=torch.int64)
    terms = objective(made, x, aux_k=0, aux_coefficient=0.0, dead=none)
    assert terms.loss.item() == pytest.approx((squared(2) + squared(8) / 8) / spread, rel=1e-5)
    terms.loss.backward()
    plain = Dictionary.random(8, 32, TopK(2), seed=0)
    objective(plain, x, aux_k=0, aux_coefficient=0.0, dead=none).loss.backward()
    # The wide codes train the encoder too: the gradient of the narrow ones alone is another.
    assert not torch.allclose(made.W_enc.grad, plain.W_enc.grad)
    assert int((made.W_enc.grad != 0).any(0).sum()) > int((plain.W_enc.grad != 0).any(0).sum())


def test_the_gradient_changes_the_ranking_and_not_the_values():
    atoms = torch.eye(3)
    pre = torch.tensor([[3.0, 2.0, -5.0]])
    batch = Batch(torch.zeros(1, 3), atoms, torch.zeros(3), torch.tensor([[0.0, 7.0, 9.0]]))
    rule = GradientTopK(1, beta=1.0)
    codes = rule(pre, batch)
    # Of norm sqrt(3) the gradient is (0, 1.06, 1.37): 2 (1 + 1.06) beats 3; what is negative never.
    assert codes.indices.tolist() == [[1]]
    assert codes.values.tolist() == [[2.0]]
    assert rule(pre, batch._replace(gradient=1000 * batch.gradient)).indices.tolist() == [[1]]
    assert rule(pre, batch._replace(gradient=None)).indices.tolist() == [[0]]
    assert rule(pre, batch._replace(gradient=torch.zeros(1, 3))).indices.tolist() == [[0]]
    assert GradientTopK(1, beta=0.0)(pre, batch).indices.tolist() == [[0]]


def test_no_gradient_flows_through_the_gradient():
    given = torch.tensor([[0.0, 7.0, 9.0]], requires_grad=True)
    atoms = torch.eye(3, requires_grad=True)
    pre = torch.tensor([[3.0, 2.0, -5.0]], requires_grad=True)
    GradientTopK(1)(pre, Batch(pre, atoms, torch.zeros(3), given)).values.sum().backward()
    assert given.grad is None
    assert atoms.grad is None
    assert pre.grad.tolist() == [[0.0, 1.0, 0.0]]


def test_relu_with_a_bias_is_one_proximal_step():
    """Where AbsTopK's paper starts: soft thresholding, kept positive, is a ReLU with a bias."""
    v = torch.linspace(-3, 3, 61)
    torch.testing.assert_close((v - 0.7).relu(), soft(v, 0.7).clamp_min(0))
