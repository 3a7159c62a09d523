"""Concrete search: learn a logit for every weight, through noisy masks between 0 and 1.

Shapes: a logit and a mask for every weight, as its parameter is stored.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.layers import Layer
from gossamer.methods.training.tickets.balance import Balance, balancer
from gossamer.methods.training.tickets.looking import SearchData
from gossamer.methods.training.tickets.objectives import OBJECTIVES, Frozen, Objectives

__all__ = ["TEMPERATURE", "Found", "Plan", "concrete_search", "relaxed"]

TEMPERATURE = 2.0 / 3.0
"""Of the binary Concrete masks; it is not annealed."""
_SCALE = 100.0


@dataclass(frozen=True)
class Plan:
    """How to search.

    Parameters
    ----------
    sparsity : of all layers together. steps : of Adam on the logits, at least 1.
    lr : of Adam; a tenth of it over the last 12 % of the steps. seed : of the noise.
    """

    sparsity: float
    steps: int
    objective: Objectives = "kl"
    balance: Balance = "gradbalance"
    lr: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """What a search found.

    Parameters
    ----------
    logits : by layer, (O, I); the largest are the ticket.
    trace : (steps, 3): objective (not scaled), expected weights over the budget, multiplier; before
        every step.
    kept : expected weights over the budget in the end, Σσ(logits) / κd.
    forwards : cost in forward passes of the dense network. memory : bytes of logits and Adam.
    """

    logits: dict[str, Tensor]
    trace: Tensor
    kept: float
    forwards: float
    memory: int

    def without_logits(self) -> "Found":
        """The same, to remember while training."""
        return replace(self, logits={})


def relaxed(logits: Tensor, noise: Tensor) -> Tensor:
    """A binary Concrete sample σ((α + log u - log(1 - u)) / τ).

    Parameters
    ----------
    noise : u, uniform in [0, 1).
    """
    return ((logits + noise.logit(eps=1e-7)) / TEMPERATURE).sigmoid()


def concrete_search(
    model: nn.Module, layers: Sequence[Layer], data: SearchData, plan: Plan
) -> Found:
    """Logits whose largest name the weights of a ticket; the model is left as it is.

    Every step draws masks m from the logits α, computes the objective J with m ⊙ θ, and hands
    ∂(100 J)/∂α + λ ∂e/∂α to Adam, with e = 100 (Σσ(α) / (r κd) - 1), where κd weights are to stay
    and r relaxes the budget while GradBalance (r = 1.1) finds λ.

    Parameters
    ----------
    model : in the mode it is to compute in.

    Raises
    ------
    GossamerError
        If the data cannot be used, or the objective stops being a number.
    """
    search = _Search(Frozen(model, layers, data), plan)
    trace: list[Tensor] = []
    batches = data.forever()
    with _frozen(model, but_weights=search.objective.by_weights):
        for step in range(plan.steps):
            if step == round(0.88 * plan.steps):
                search.slow_down()
            trace.append(search.step(next(batches)))
            if data.progress is not None:
                data.progress(step + 1, plan.steps, f"search by {plan.objective}")
    return search.found(torch.stack(trace).cpu())


class _Search:
    """Logits at work."""

    def __init__(self, net: Frozen, plan: Plan) -> None:
        self.net = net
        self.objective = OBJECTIVES[plan.objective]
        self.budget = (1.0 - plan.sparsity) * sum(layer.size for layer in net.layers)
        start = log((1.0 - plan.sparsity) / plan.sparsity)
        self.alphas = {
            path: torch.full_like(weight, start, dtype=torch.float32, requires_grad=False)
            for path, weight in net.weights.items()
        }
        self.masked = {path: self._masked(path) for path in self.alphas}
        self.optimizer = torch.optim.Adam(self.alphas.values(), lr=plan.lr)
        self.balance = balancer(plan.balance, plan.lr)
        self.device = next(iter(self.alphas.values())).device
        self.noise = torch.Generator(self.device).manual_seed(plan.seed)

    def _masked(self, path: str) -> Tensor | None:
        """Where a parameter is behind a mask; None for everywhere, as all but stacked experts."""
        weight = self.net.weights[path]
        own = [layer for layer in self.net.layers if layer.parameter == path]
        if sum(layer.size for layer in own) == weight.numel():
            return None
        found = torch.zeros_like(weight, dtype=torch.bool, requires_grad=False)
        for layer in own:
            layer.view(found).fill_(True)
        return found

    def slow_down(self) -> None:
        """A tenth of the learning rate from now on."""
        self.optimizer.param_groups[0]["lr"] *= 0.1
        self.balance.scale(0.1)

    def _given(self, path: str, mask: Tensor) -> Tensor:
        """A mask as the network gets it: 1 where there is none."""
        at = self.masked[path]
        return mask if at is None else torch.where(at, mask, 1.0)

    def _open(self, path: str) -> Tensor:
        """Probability of being kept; 0 where there is no mask."""
        at, found = self.masked[path], self.alphas[path].sigmoid()
        return found if at is None else found * at

    def kept(self) -> Tensor:
        """Expected weights over the budget."""
        return torch.stack([self._open(path).sum() for path in self.alphas]).sum() / self.budget

    def step(self, batch: Any) -> Tensor:
        """One step of Adam; the objective, what is kept, and the multiplier before it."""
        masks: dict[str, Tensor] = {}
        for path, alpha in self.alphas.items():
            drawn = torch.rand(alpha.shape, generator=self.noise, device=self.device)
            masks[path] = relaxed(alpha, drawn).requires_grad_()
        given = {path: self._given(path, mask) for path, mask in masks.items()}
        value = self.objective.value(self.net, batch, given)
        slopes = torch.autograd.grad(value, list(masks.values()))
        with torch.no_grad():
            task = [
                slope * mask * (1.0 - mask) * (_SCALE / TEMPERATURE)
                for slope, mask in zip(slopes, masks.values(), strict=True)
            ]
            kept = self.kept()
            relax = self.balance.relaxed
            steep = 100.0 / (relax * self.budget)
            towards = [steep * p * (1.0 - p) for p in map(self._open, self.alphas)]
            multiplier = self.balance.pull(task, towards, 100.0 * (kept / relax - 1.0))
            for alpha, ours, theirs in zip(self.alphas.values(), task, towards, strict=True):
                alpha.grad = ours + multiplier * theirs
        self.optimizer.step()
        return torch.stack([value.detach().float(), kept, multiplier])

    def found(self, trace: Tensor) -> Found:
        """What was found."""
        bad = (~trace.isfinite().all(1)).nonzero()
        if len(bad):
            step = int(bad[0])
            raise GossamerError(
                f"the search's objective is {float(trace[step, 0])} at step {step + 1} of "
                f"{len(trace)}; check the batches, or lower search_lr"
            )
        for alpha in self.alphas.values():
            alpha.grad = None
        return Found(
            {layer.name: layer.view(self.alphas[layer.parameter]) for layer in self.net.layers},
            trace,
            float(self.kept()),
            self.objective.forwards * len(trace),
            3 * sum(alpha.numel() * alpha.element_size() for alpha in self.alphas.values()),
        )


@contextmanager
def _frozen(model: nn.Module, *, but_weights: bool) -> Iterator[None]:
    """Inside, parameters want no gradients, except where the objective is made of some."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if not but_weights:
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
        yield
    finally:
        for parameter, want in wanted:
            parameter.requires_grad_(want)
