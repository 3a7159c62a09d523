"""The sparse posterior: exact counts, zeros outside, divergence, exchange."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from gossamer.methods.training.bayesian.posterior import Posterior, inverse_softplus

SHAPE = (6, 10)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rho_of(*sigma: float) -> torch.Tensor:
    return inverse_softplus(torch.tensor(sigma, dtype=torch.float64)).float()


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 60), (0.5, 30), (0.9, 6), (0.97, 2)])
def test_start(sparsity, kept):
    posterior = Posterior.random(SHAPE, sparsity, generator())
    assert len(posterior) == kept
    assert torch.allclose(posterior.sigma(), torch.full((kept,), 6e-4), rtol=1e-3)
    assert int((posterior.dense(posterior.mu) != 0).sum()) == kept


def test_inactive_weights_are_zero_in_every_sample():
    posterior = Posterior.random(SHAPE, 0.8, generator())
    posterior.rho = rho_of(*[1.0] * 12)
    active = torch.zeros(60, dtype=torch.bool)
    active[posterior.places] = True
    draws = torch.stack([posterior.sample(generator(s)) for s in range(400)]).flatten(1)
    assert (draws[:, ~active] == 0).all()
    assert torch.allclose(draws[:, active].mean(0), posterior.mu, atol=0.25)
    assert torch.allclose(draws[:, active].std(0), torch.ones(12), atol=0.2)


def test_divergence_counts_active_weights_only():
    mu, rho = torch.tensor([0.3, -0.2]), rho_of(0.1, 0.4)
    posterior = Posterior.at(SHAPE, torch.tensor([4, 50]), mu, rho)
    wanted = kl_divergence(Normal(mu, torch.tensor([0.1, 0.4])), Normal(0.0, 0.5)).sum()
    assert torch.allclose(posterior.divergence(mu, rho, 0.5), wanted)


def test_exchange():
    places, mu = torch.tensor([1, 3, 5, 7]), torch.tensor([0.5, 0.01, -0.8, 0.9])
    posterior = Posterior.at((2, 5), places, mu.clone(), rho_of(0.1, 0.2, 0.3, 0.5))
    posterior.mu_velocity = torch.ones(4)
    posterior.rho_velocity = torch.full((4,), 2.0)
    gradient = torch.zeros(2, 5)
    gradient[0, 3] = 100.0  # Active, and about to go: may not come back.
    gradient[1, 4] = -3.0
    gradient[0, 0] = 2.0
    assert posterior.exchange(0.25, "mean", gradient) == 1
    assert posterior.places.tolist() == [1, 5, 7, 9]
    assert posterior.mu.tolist() == pytest.approx([0.5, -0.8, 0.9, 0.0])
    assert posterior.sigma().tolist() == pytest.approx([0.1, 0.3, 0.5, 0.3], rel=1e-4)
    assert posterior.mu_velocity.tolist() == [1, 1, 1, 0]
    assert posterior.rho_velocity.tolist() == [2, 2, 2, 0]


def test_the_criterion_decides_what_goes():
    def left(criterion: str) -> list[int]:
        mu, rho = torch.tensor([0.0, 0.05]), rho_of(1.0, 0.1)
        posterior = Posterior.at((2, 5), torch.tensor([2, 6]), mu, rho)
        posterior.exchange(0.5, criterion, torch.arange(10.0).view(2, 5))  # type: ignore[arg-type]
        return posterior.places.tolist()

    assert left("snr") == [6, 9]
    assert left("abs_mean") == [2, 9]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.9])
def test_the_count_never_changes(share, sparsity):
    posterior = Posterior.random(SHAPE, sparsity, generator())
    before = len(posterior)
    posterior.exchange(share, "abs_snr", torch.randn(SHAPE, generator=generator(1)))
    assert len(posterior) == len(set(posterior.places.tolist())) == before
    assert (posterior.places.diff() > 0).all()


def test_softplus_goes_round():
    values = torch.tensor([1e-6, 6e-4, 0.1, 1.0, 20.0], dtype=torch.float64)
    assert torch.allclose(torch.nn.functional.softplus(inverse_softplus(values)), values)
