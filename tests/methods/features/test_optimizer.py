import pytest
import torch
from torch import nn

from gossamer.kernels.sparse_code.op import usable
from gossamer.methods.features.optimizer import DictionaryAdam

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"W_enc": (6, 10), "W_dec": (10, 6), "b_dec": (6,), "b_enc": (10,)}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def parameters():
    made = {n: nn.Parameter(random(*shape, seed=len(n))) for n, shape in SHAPES.items()}
    made["W_enc"] = nn.Parameter(random(10, 6, seed=3).T)
    with torch.no_grad():
        made["W_dec"] /= made["W_dec"].norm(dim=1, keepdim=True)
    return made


def gradients(step):
    """Large ones, which are clipped, and small ones, which are not."""
    size = 3.0 if step % 2 else 0.01
    return {n: size * random(*shape, seed=100 + step + len(n)) for n, shape in SHAPES.items()}


def run(steps=5, fused=None, **options):
    made = parameters()
    work = DictionaryAdam(made, unit=("W_dec",), **options)
    if fused is not None:
        work.fused = fused
    for step in range(steps):
        work.zero_grad()
        for name, grad in gradients(step).items():
            made[name].grad = grad.to(made[name].dtype)
            if name == "W_enc":
                made[name].grad = grad.T.contiguous().T.to(made[name].dtype)
        work.step(lr=0.01)
    return made, work


def by_hand(steps=5):
    """Adam, the projection, the clipping and the norm, in float64 and in full."""
    p = {n: t.detach().double() for n, t in parameters().items()}
    m = {n: torch.zeros_like(t) for n, t in p.items()}
    v = {n: torch.zeros_like(t) for n, t in p.items()}
    for step in range(steps):
        g = {n: t.double() for n, t in gradients(step).items()}
        g["W_dec"] -= (g["W_dec"] * p["W_dec"]).sum(1, keepdim=True) * p["W_dec"]
        total = torch.sqrt(sum(t.square().sum() for t in g.values()))
        clip = min(1.0, 1.0 / (float(total) + 1e-6))
        for n, tensor in p.items():
            m[n] = 0.9 * m[n] + 0.1 * clip * g[n]
            v[n] = 0.999 * v[n] + 0.001 * (clip * g[n]).square()
            first, second = m[n] / (1 - 0.9 ** (step + 1)), v[n] / (1 - 0.999 ** (step + 1))
            p[n] = tensor - 0.01 * first / (second.sqrt() + 6.25e-10)
        p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True)
    return p


FUSED = [False, pytest.param(True, marks=pytest.mark.skipif(not usable(DEVICE), reason="Triton"))]


@pytest.mark.parametrize("fused", FUSED)
def test_steps_are_those_of_adam(fused):
    made, _ = run(fused=fused)
    for name, wanted in by_hand().items():
        torch.testing.assert_close(made[name].detach().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", FUSED)
def test_masters_stay_float32_where_the_rest_computes_in_half(fused):
    made, work = run(fused=fused, compute=torch.bfloat16)
    assert made["W_enc"].dtype == made["W_dec"].dtype == torch.bfloat16
    assert made["b_dec"].dtype == torch.float32
    for name in ("W_enc", "W_dec"):
        master = work.masters[name].detach()
        assert master.dtype == torch.float32
        # Triton's interpreter cuts bits off where a GPU rounds.
        torch.testing.assert_close(made[name].detach().float(), master, rtol=2**-7, atol=0)
    kept = {name: master.detach().clone() for name, master in work.masters.items()}
    wanted = by_hand()
    work.release()
    for name, parameter in made.items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None
        assert torch.equal(parameter.detach(), kept[name])
        torch.testing.assert_close(parameter.detach().double(), wanted[name], rtol=0, atol=2e-2)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_state_goes_on_with_the_same_bits(compute):
    whole, _ = run(steps=6, compute=compute)
    _, half = run(steps=3, compute=compute)
    state = {name: tensor.clone() for name, tensor in half.state().items()}
    made = parameters()
    work = DictionaryAdam(made, unit=("W_dec",), compute=compute)
    work.load(state)
    for step in range(3, 6):
        for name, grad in gradients(step).items():
            made[name].grad = grad.to(made[name].dtype)
            if name == "W_enc":
                made[name].grad = grad.T.contiguous().T.to(made[name].dtype)
        work.step(lr=0.01)
    for name, parameter in whole.items():
        assert torch.equal(made[name], parameter)


def test_parameters_without_a_gradient_stay():
    made = parameters()
    before = {name: tensor.detach().clone() for name, tensor in made.items()}
    work = DictionaryAdam(made)
    made["b_enc"].grad = torch.ones_like(made["b_enc"])
    work.step(lr=0.1)
    assert not torch.equal(made["b_enc"], before["b_enc"])
    assert torch.equal(made["W_enc"], before["W_enc"])


def test_other_processes_parts_count_in_the_norm():
    alone, _ = run(steps=1)
    # With ten times the norm elsewhere, all that is clipped shrinks.
    made = parameters()
    work = DictionaryAdam(
        made, unit=("W_dec",), total=lambda squares: 100 * torch.stack(list(squares.values())).sum()
    )
    for name, grad in gradients(1).items():
        made[name].grad = grad
    work.step(lr=0.01)
    first = {name: mean for name, (mean, _) in work.moments.items()}
    total = torch.sqrt(sum(mean.square().sum() for mean in first.values()))
    assert float(total) == pytest.approx(0.1 / 10, rel=1e-3)
    assert set(alone) == set(first)
