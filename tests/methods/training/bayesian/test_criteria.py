"""Closed forms against a million samples, and against known cases."""

import math

import pytest
import torch

from gossamer.methods.training.bayesian.criteria import (
    CRITERIA,
    absolute_mean,
    absolute_snr,
    exponential_mean,
    exponential_snr,
)

CASES = [(0.0, 1.0), (0.3, 0.5), (-0.8, 0.4), (1.5, 0.3), (-0.01, 0.02), (2.0, 1.0)]


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("mu", "sigma"), CASES)
def test_against_samples(noise, mu, sigma):
    m, s = torch.tensor([mu]), torch.tensor([sigma])
    size = (mu + sigma * noise).abs()
    assert float(absolute_mean(m, s)) == pytest.approx(float(size.mean()), rel=0.01)
    assert float(absolute_snr(m, s)) == pytest.approx(float(size.mean() / size.std()), rel=0.01)
    raised = size.exp()
    assert float(exponential_mean(m, s)) == pytest.approx(float(raised.mean()), rel=0.01)
    found = float(exponential_snr(m, s))
    assert found == pytest.approx(float(raised.mean() / raised.std()), rel=0.01)


def test_at_mean_zero():
    m, s = torch.zeros(1), torch.full((1,), 3.0)
    assert float(absolute_mean(m, s)) == pytest.approx(3 * math.sqrt(2 / math.pi))
    assert float(absolute_snr(m, s)) == pytest.approx(1 / math.sqrt(math.pi / 2 - 1))
    assert float(CRITERIA["snr"](m, s)) == 0


@pytest.mark.parametrize("name", list(CRITERIA))
def test_certain_weights(name):
    """With almost no spread the size decides alone, and nothing overflows."""
    mu, sigma = torch.tensor([0.5, -2.0, 1.0]), torch.full((3,), 1e-8)
    worth = CRITERIA[name](mu, sigma)
    assert torch.isfinite(worth).all()
    assert worth.argsort().tolist() == [0, 2, 1] if name != "exp_snr" else True
    assert torch.equal(worth, CRITERIA[name](-mu, sigma))


def test_far_from_zero_both_signal_to_noise_agree():
    mu, sigma = torch.tensor([50.0, 400.0]), torch.ones(2)
    assert torch.allclose(absolute_snr(mu, sigma), CRITERIA["snr"](mu, sigma), rtol=1e-12)


def test_the_criteria_disagree():
    """A wide weight around zero is no small one: |mu| / sigma cannot tell."""
    mu, sigma = torch.tensor([0.0, 0.05]), torch.tensor([1.0, 0.1])
    assert CRITERIA["snr"](mu, sigma).argmin() == 0
    assert CRITERIA["abs_mean"](mu, sigma).argmin() == 1


def test_the_folded_signal_to_noise_ranks_as_the_plain_one():
    z = torch.linspace(0, 30, 3001, dtype=torch.float64)
    assert (absolute_snr(z, torch.ones_like(z)).diff() > 0).all()
    mu, sigma = torch.tensor([0.2, 2.0]), torch.tensor([0.1, 1.0])
    first, second = absolute_snr(mu, sigma).tolist()
    assert first == pytest.approx(second)


@pytest.mark.parametrize(("mu", "sigma"), [*CASES, (0.4, 1.3), (-3.0, 2.0)])
def test_against_integrals(mu, sigma):
    """Where the tail of exp|theta| is too heavy for samples: a fine sum over 14 deviations."""
    z = torch.linspace(-14, 14, 400_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    size = (mu + sigma * z).abs()

    def expect(value: torch.Tensor) -> float:
        return float(torch.trapezoid(value * density, z))

    m = torch.tensor([mu], dtype=torch.float64)
    s = torch.tensor([sigma], dtype=torch.float64)
    for value, found, noise in (
        (size, absolute_mean, absolute_snr),
        (size.exp(), exponential_mean, exponential_snr),
    ):
        first = expect(value)
        spread = math.sqrt(expect((value - first).square()))
        assert float(found(m, s)) == pytest.approx(first, rel=1e-7)
        assert float(noise(m, s)) == pytest.approx(first / spread, rel=1e-6)
