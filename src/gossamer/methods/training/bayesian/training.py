"""Variational training in a sparse subspace that changes."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gossamer.core import GossamerError
from gossamer.methods.training.bayesian.criteria import Criterion
from gossamer.methods.training.bayesian.posterior import Posterior
from gossamer.models import Progress

__all__ = ["Plan", "Trained", "train", "weights_of"]

_MOMENTUM = 0.9


@dataclass(frozen=True)
class Plan:
    """How to train: see :class:`~gossamer.methods.training.ssvi.SSVI`."""

    sparsity: float
    steps: int
    batch_size: int
    lr: float
    sigma_lr: float
    decay: float
    prior: float
    kl: float
    every: int
    until: float
    exchange: float
    criterion: Criterion

    def share(self, step: int) -> float:
        """Share of the active weights exchanged before an update, 0 for none."""
        end = self.until * self.steps
        if not 0 < step < end or step % self.every:
            return 0.0
        return self.exchange * 0.5 * (1 + cos(pi * step / end))


@dataclass
class Trained:
    """Posteriors by the name of their matrix, and every other parameter."""

    posteriors: dict[str, Posterior]
    others: dict[str, Tensor]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Matrices of the linear layers and kernels of the convolutions, by parameter name.

    Raises
    ------
    GossamerError
        If there are none.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    found = {f"{n}.weight".lstrip("."): m for n, m in model.named_modules() if isinstance(m, kinds)}
    if not found:
        raise GossamerError(
            f"{type(model).__name__} has no linear layers or convolutions to train; give a network"
        )
    return {name: module.weight for name, module in found.items()}


def _batches(count: int, size: int, generator: Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(min(size, count))


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    plan: Plan,
    generator: Generator,
    progress: Progress | None = None,
) -> Trained:
    """Posteriors of the weights of a classifier, which itself is not changed.

    Raises
    ------
    GossamerError
        If the loss is no longer finite.
    """
    weights = weights_of(model)
    posteriors = {
        name: Posterior.random(tuple(weight.shape), plan.sparsity, generator)
        for name, weight in weights.items()
    }
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n not in weights}
    trained = Trained(posteriors, others)
    velocity = {n: torch.zeros_like(p) for n, p in others.items()}
    batches = _batches(len(x), plan.batch_size, generator)
    for step in range(plan.steps):
        if share := plan.share(step):
            chosen = next(batches)
            batch = x[chosen], y[chosen]
            _change(model, trained, batch, share, plan.criterion, generator)
        chosen = next(batches)
        warm = min(2.0 * step / plan.steps, 1.0)
        now = _Moment(0.5 * (1 + cos(pi * step / plan.steps)), warm * plan.kl / len(x), plan)
        loss = _step(model, trained, velocity, (x[chosen], y[chosen]), now, generator)
        if not loss < float("inf"):
            raise GossamerError(
                f"training diverged at update {step + 1} of {plan.steps}; give a smaller lr"
            )
        if progress is not None:
            progress(step + 1, plan.steps, "training the sparse posterior")
    return trained


@dataclass(frozen=True)
class _Moment:
    """Share of the learning rates, and weight of the divergence, at one update."""

    rate: float
    kappa: float
    plan: Plan


Batch = tuple[Tensor, Tensor]


def _loss(
    model: nn.Module, drawn: dict[str, Tensor], others: dict[str, Tensor], batch: Batch
) -> Tensor:
    return cross_entropy(functional_call(model, {**drawn, **others}, (batch[0],)), batch[1])


def _change(
    model: nn.Module,
    trained: Trained,
    batch: Batch,
    share: float,
    criterion: Criterion,
    generator: Generator,
) -> None:
    """Exchange weights by the gradient of one drawn network; outside sigma is 0, so it is mu's."""
    posteriors = trained.posteriors
    drawn = {n: p.sample(generator).requires_grad_() for n, p in posteriors.items()}
    loss = _loss(model, drawn, trained.others, batch)
    gradients = torch.autograd.grad(loss, list(drawn.values()))
    for posterior, gradient in zip(posteriors.values(), gradients, strict=True):
        posterior.exchange(share, criterion, gradient)


def _step(
    model: nn.Module,
    trained: Trained,
    velocity: dict[str, Tensor],
    batch: Batch,
    now: _Moment,
    generator: Generator,
) -> float:
    """One update of means, scales and the deterministic parameters; returns the loss before."""
    leaves: list[Tensor] = []
    drawn: dict[str, Tensor] = {}
    penalty = torch.zeros(())
    plan = now.plan
    for name, posterior in trained.posteriors.items():
        mu = posterior.mu.detach().requires_grad_()
        rho = posterior.rho.detach().requires_grad_()
        noise = torch.randn(len(posterior), generator=generator)
        drawn[name] = posterior.dense(mu + posterior.sigma(rho) * noise)
        penalty = penalty + posterior.divergence(mu, rho, plan.prior)
        leaves += [mu, rho]
    free = {n: p.detach().requires_grad_() for n, p in trained.others.items()}
    loss = _loss(model, drawn, free, batch) + now.kappa * penalty
    grads = list(torch.autograd.grad(loss, [*leaves, *free.values()]))
    lr, sigma_lr = now.rate * plan.lr, now.rate * plan.sigma_lr
    for i, posterior in enumerate(trained.posteriors.values()):
        _descend(posterior.mu, posterior.mu_velocity, grads[2 * i], lr, plan.decay)
        _descend(posterior.rho, posterior.rho_velocity, grads[2 * i + 1], sigma_lr, 0.0)
    for name, grad in zip(free, grads[len(leaves) :], strict=True):
        _descend(trained.others[name], velocity[name], grad, lr, plan.decay)
    return float(loss.detach())


def _descend(value: Tensor, velocity: Tensor, grad: Tensor, lr: float, decay: float) -> None:
    velocity.mul_(_MOMENTUM).add_(grad).add_(value, alpha=decay)
    value.sub_(velocity, alpha=lr)
