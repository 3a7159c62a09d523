import pytest
import torch

from gossamer.core import GossamerError
from gossamer.core.prox import hard
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.objective import objective
from gossamer.methods.features.rules import Batch, Gated, JumpReLU, ReLU, Step, TopK

NONE = torch.empty(0, dtype=torch.int64)


def step(rule, pre, atoms=None):
    """A step of a batch whose error is zero."""
    atoms = torch.eye(pre.shape[1]) if atoms is None else atoms
    batch = Batch(torch.zeros(len(pre), atoms.shape[1]), atoms, torch.zeros(atoms.shape[1]))
    return Step(batch, pre, rule(pre, batch), torch.zeros(len(pre), atoms.shape[1]))


def test_relu_keeps_every_positive_one_and_charges_for_it():
    rule = ReLU(2.0)
    given = step(rule, torch.tensor([[3.0, -1.0, 0.5]]), torch.diag(torch.tensor([1.0, 10.0, 4.0])))
    assert given.codes.indices.tolist() == [[0, 2]]
    assert given.codes.values.tolist() == [[3.0, 0.5]]
    assert rule.penalty(given).item() == 2.0 * (3.0 * 1.0 + 0.5 * 4.0)


def test_a_penalty_rises_over_the_warmup():
    rule = ReLU(2.0, warmup=4)
    given = step(rule, torch.tensor([[1.0, 0.0]]))
    assert [rule.penalty(given).item() for _ in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_jumprelu_is_one_proximal_step_of_l0_with_a_threshold_of_its_own():
    rule = JumpReLU(3, initial=0.0).eval()
    with torch.no_grad():
        rule.threshold.copy_(torch.tensor([1.0, 2.0, 0.0]))
    pre = torch.tensor([[1.5, 1.5, -1.0], [1.0, 2.5, 0.2]])
    dense = torch.zeros(2, 3)
    codes = rule(pre)
    kept = codes.indices >= 0
    dense[kept.nonzero()[:, 0], codes.indices[kept]] = codes.values[kept].detach()
    assert dense.tolist() == [[1.5, 0.0, 0.0], [0.0, 2.5, pytest.approx(0.2)]]
    v = torch.linspace(-3, 3, 61)
    same = JumpReLU(1, initial=(2 * 0.5) ** 0.5).eval()
    codes = same(v[:, None])
    found = codes.values[:, 0].detach() if codes.values.shape[1] else torch.zeros(61)
    torch.testing.assert_close(found, hard(v, 0.5).clamp_min(0))


def test_jumprelu_derivatives_by_hand():
    """Inside the window only, on both sides of the threshold; none of the count by the codes."""
    rule = JumpReLU(4, target=2.0, coefficient=3.0, bandwidth=0.4, initial=1.0)
    # Distances from the threshold: below and above inside the window, below and above outside.
    pre = torch.tensor([[0.9, 1.1, 0.5, 2.0]], requires_grad=True)
    given = step(rule, pre)
    upstream = torch.tensor([10.0, 20.0, 30.0, 40.0])
    dense = torch.zeros(1, 4).scatter_add(1, given.codes.indices, given.codes.values)
    (dense * upstream).sum().backward()
    assert pre.grad.tolist() == [[0.0, 20.0, 0.0, 40.0]]
    torch.testing.assert_close(rule.threshold.grad, torch.tensor([-25.0, -50.0, 0.0, 0.0]))
    pre.grad, rule.threshold.grad = None, None
    penalty = rule.penalty(given)
    # L0 is 2 of a target of 2: no penalty, no derivative. With a target of 1 it is 3 (2 - 1)^2.
    assert penalty.item() == 0.0
    tight = JumpReLU(4, target=1.0, coefficient=3.0, bandwidth=0.4, initial=1.0)
    penalty = tight.penalty(step(tight, pre))
    assert penalty.item() == 3.0
    penalty.backward()
    assert pre.grad is None
    # d/dt 3 (L0 - 1)^2 = 6 (L0 - 1) dL0/dt, and dL0/dt = -1 / 0.4 inside the window.
    torch.testing.assert_close(tight.threshold.grad, torch.tensor([-15.0, -15.0, 0.0, 0.0]))


def test_thresholds_stay_above_half_the_window_and_still_move():
    rule = JumpReLU(2, bandwidth=0.4, initial=0.05)
    assert rule.limits().tolist() == [pytest.approx(0.2)] * 2
    rule.limits().sum().backward()
    assert rule.threshold.grad.tolist() == [1.0, 1.0]


def test_scales_fold_into_thresholds_and_gates():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    gated, jump = Gated(24), JumpReLU(24, bandwidth=0.2, initial=0.4)
    with torch.no_grad():
        for name in ("b_gate", "b_mag", "r_mag"):
            getattr(gated, name).normal_(generator=torch.Generator().manual_seed(1))
    for rule in (gated, jump):
        made = Dictionary.random(6, 24, rule, seed=0).eval()
        with torch.no_grad():
            wanted = made(5.0 * x) / 5.0
            made.fold_input_scale(5.0)
            torch.testing.assert_close(made(x), wanted)
            assert float((made.encode(x).values != 0).sum()) > 0


def gated_step(auxiliary=True):
    made = Dictionary.random(6, 24, Gated(24, coefficient=0.0, auxiliary=auxiliary), seed=0).train()
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    objective(made, x, aux_k=0, aux_coefficient=0.0, dead=NONE).loss.backward()
    return made


def test_only_the_auxiliary_reconstruction_opens_gates():
    blind = gated_step(auxiliary=False)
    assert blind.rule.b_gate.grad is None or not bool(blind.rule.b_gate.grad.any())
    assert bool(gated_step().rule.b_gate.grad.any())


def test_the_auxiliary_reconstruction_does_not_train_the_atoms():
    with_it, without = gated_step(), gated_step(auxiliary=False)
    torch.testing.assert_close(with_it.W_dec.grad, without.W_dec.grad)
    torch.testing.assert_close(with_it.b_dec.grad[:0], without.b_dec.grad[:0])
    assert not torch.allclose(with_it.W_enc.grad, without.W_enc.grad)


def test_gated_decides_with_one_half_and_measures_with_the_other():
    rule = Gated(3)
    with torch.no_grad():
        rule.b_gate.copy_(torch.tensor([0.0, -5.0, 2.0]))
        rule.b_mag.copy_(torch.tensor([0.5, 0.0, 0.0]))
        rule.r_mag.copy_(torch.tensor([0.0, 0.0, 1.0]).log1p())
    codes = rule(torch.tensor([[1.0, 4.0, -1.0]]))
    # Latent 1: its gate is shut at 4 - 5. Latent 2: the gate is open at -1 + 2, the size is 0.
    assert codes.indices.tolist() == [[0]]
    assert codes.values.tolist() == [[1.5]]


def test_gated_has_no_encoder_bias_in_files_or_training():
    made = Dictionary.random(6, 24, Gated(24), seed=0)
    assert not made.b_enc.requires_grad
    assert sorted(made.tensors()) == ["W_dec", "W_enc", "b_dec", "b_gate", "b_mag", "r_mag"]
    assert "b_enc" in Dictionary.random(6, 24, TopK(2), seed=0).tensors()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReLU(-1.0), "coefficient"),
        (lambda: ReLU(float("nan")), "coefficient"),
        (lambda: JumpReLU(8, target=9.0), "target is"),
        (lambda: JumpReLU(8, target=0.0), "target is"),
        (lambda: JumpReLU(8, bandwidth=-0.1), "bandwidth"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(GossamerError, match=message):
        make()
