import pytest
import torch

from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.objective import Layout, aux_loss, objective
from gossamer.methods.features.rules import AbsTopK, BatchTopK, GradientTopK, MutualChoice, TopK

NONE = torch.empty(0, dtype=torch.int64)


def rows(count=40, wide=8, seed=1):
    return torch.randn(count, wide, generator=torch.Generator().manual_seed(seed))


def test_layout_splits_columns():
    x, target, gradient = Layout(2, 3, 2).split(torch.arange(7.0)[None])
    assert (x.tolist(), target.tolist(), gradient.tolist()) == ([[0, 1]], [[2, 3, 4]], [[5, 6]])
    x, target, gradient = Layout(7).split(torch.arange(7.0)[None])
    assert target is None
    assert gradient is None


def test_fvu_is_about_the_batch_mean():
    made = Dictionary.random(8, 32, TopK(4), seed=0)
    x = 100.0 + rows()
    with torch.no_grad():
        made.b_dec.fill_(100.0)
    terms = objective(made, x, aux_k=0, aux_coefficient=0.0, dead=NONE)
    error = (x - made(x)).detach().square().sum()
    assert terms.fvu.item() == pytest.approx(
        float(error / (x - x.mean(0)).square().sum()), rel=1e-4
    )
    assert terms.loss.item() == pytest.approx(terms.fvu.item(), rel=1e-6)


@pytest.mark.parametrize("rule", [TopK(4), BatchTopK(4), AbsTopK(4)])
def test_gradients_are_those_of_the_dense_formula(rule):
    """Values, and all four gradients, against autograd through the M-wide code, in float64."""
    made = Dictionary.random(8, 32, rule, seed=0).double().train()
    with torch.no_grad():
        made.b_dec.normal_(generator=torch.Generator().manual_seed(4))
        if rule.encoder_bias:
            made.b_enc.normal_(generator=torch.Generator().manual_seed(5))
    x = rows().double()
    terms = objective(made, x, aux_k=0, aux_coefficient=0.0, dead=NONE)
    terms.loss.backward()
    names = ["W_enc", "W_dec", "b_dec", *(["b_enc"] if rule.encoder_bias else [])]
    got = {name: getattr(made, name).grad.clone() for name in names}
    made.zero_grad()
    pre = (x - made.b_dec) @ made.W_enc + made.b_enc
    mask = torch.zeros_like(pre).scatter_add(
        1, terms.codes.indices.clamp_min(0), (terms.codes.indices >= 0).double()
    )
    z = pre * (mask > 0)
    loss = (x - z @ made.W_dec - made.b_dec).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(loss, terms.loss)
    loss.backward()
    for name in names:
        torch.testing.assert_close(got[name], getattr(made, name).grad, rtol=1e-9, atol=1e-12)


def dead_step(rule, pool):
    made = Dictionary.random(8, 32, rule, seed=0).train()
    x = rows()
    pre, batch = made.encoded(x)
    error = (rows(seed=9)).requires_grad_()
    loss = aux_loss(made, pre, batch, error, pool, 3)
    loss.backward()
    return made, error


@pytest.mark.parametrize("rule", [TopK(4), AbsTopK(4), BatchTopK(4)])
def test_the_auxiliary_loss_trains_encoder_and_atoms_of_the_pool_alone(rule):
    pool = torch.tensor([3, 11, 30])
    made, error = dead_step(rule, pool)
    touched = made.W_enc.grad.abs().sum(0).nonzero()[:, 0]
    assert touched.tolist() == made.W_dec.grad.abs().sum(1).nonzero()[:, 0].tolist() == [3, 11, 30]
    assert error.grad is None
    assert made.b_enc.grad is None or not made.b_enc.grad[[0, 1, 2]].any()


def test_the_auxiliary_loss_by_hand():
    made = Dictionary(2, 4, TopK(1))
    with torch.no_grad():
        made.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
        made.b_dec.fill_(100.0)
    pre = torch.tensor([[2.0, 1.0, 9.0, 9.0], [-1.0, -3.0, 9.0, 9.0]])
    error = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    # Row 0: atom 0 with 2 misses 3 by 1; row 1: nothing is positive, misses 1 by 1. Variance 5.
    loss = aux_loss(made, pre, None, error, torch.tensor([0, 1]), 1)
    assert loss.item() == pytest.approx((1 + 1) / 5)
    assert aux_loss(made, pre, None, error, NONE, 1).item() == 0.0
    assert aux_loss(made, pre, None, error, torch.tensor([0]), 0).item() == 0.0
    assert aux_loss(made, pre, None, torch.zeros(2, 2), torch.tensor([0]), 1).item() == 0.0


def test_signed_rules_are_revived_by_size_and_keep_the_sign():
    made = Dictionary(1, 3, AbsTopK(1))
    with torch.no_grad():
        made.W_dec.fill_(1.0)
    pre = torch.tensor([[1.0, -3.0, 9.0], [2.0, 0.5, 9.0]])
    error = torch.tensor([[-3.0], [2.0]])
    assert aux_loss(made, pre, None, error, torch.tensor([0, 1]), 1).item() == 0.0


def test_the_weight_of_the_auxiliary_loss_counts_once():
    made = Dictionary.random(8, 32, TopK(4), seed=0)
    dead = torch.tensor([1, 2, 3])
    plain = objective(made, rows(), aux_k=0, aux_coefficient=0.5, dead=dead).loss.item()
    half = objective(made, rows(), aux_k=2, aux_coefficient=0.5, dead=dead).loss.item()
    whole = objective(made, rows(), aux_k=2, aux_coefficient=1.0, dead=dead).loss.item()
    assert whole - plain == pytest.approx(2 * (half - plain), rel=1e-4)
    assert half > plain


def test_rarely_used_latents_join_the_dead_ones():
    rule = MutualChoice(4, 32, tau=1.0).train()
    made = Dictionary.random(8, 32, rule, seed=0).train()
    with torch.no_grad():
        made.codes(rows())
    alone = objective(made, rows(), aux_k=4, aux_coefficient=1.0, dead=NONE).loss.item()
    off = objective(made, rows(), aux_k=0, aux_coefficient=1.0, dead=NONE).loss.item()
    assert alone > off + 1e-3


def test_targets_and_skips():
    """With atoms and skip at zero a transcoder answers b_dec, whatever it reads."""
    made = Dictionary.random(8, 32, TopK(4), seed=0, d_out=5, skip=True)
    with torch.no_grad():
        made.W_dec.zero_()
        made.b_dec.copy_(torch.arange(5.0))
    x, y = rows(), rows(40, 5, 7)
    assert torch.equal(made(x), torch.arange(5.0).expand(40, 5))
    terms = objective(made, x, aux_k=0, aux_coefficient=0.0, dead=NONE, target=y)
    wanted = (y - torch.arange(5.0)).square().sum() / (y - y.mean(0)).square().sum()
    assert terms.fvu.item() == pytest.approx(float(wanted), rel=1e-5)
    terms.loss.backward()
    assert bool(made.W_skip.grad.any())


def test_the_gradient_reaches_the_rule():
    made = Dictionary.random(8, 32, GradientTopK(2, beta=8.0), seed=0)
    none = objective(made, rows(), aux_k=0, aux_coefficient=0.0, dead=NONE)
    some = objective(made, rows(), aux_k=0, aux_coefficient=0.0, dead=NONE, gradient=rows(seed=3))
    assert not torch.equal(none.codes.indices, some.codes.indices)
    assert some.fvu.item() > none.fvu.item()
