"""Thinning: ReLUs turn into identities or vanish while the dynamics are trained on.

Each unit draws its kind from a categorical distribution by the straight-through Gumbel-softmax;
what the expected number of ReLUs has above a shrinking budget costs. Then the kinds are fixed
and the weights are trained once more.

Source: arXiv 2312.12791, §3. Shapes: N trajectories of T steps, S states, A actions, U units.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, linear

from gossamer.core import GossamerError
from gossamer.methods.weights.dynamics.data import Trajectories
from gossamer.methods.weights.dynamics.network import RELU, SparseNet, gated
from gossamer.models import Progress

__all__ = ["Thinning", "budget_at", "discretise", "fit", "prediction_error", "thin"]

Step = Callable[[Tensor], Tensor]


def _ahead(step: Step, data: Trajectories, residual: bool) -> Tensor:
    """(N, T, S) states predicted from the first one and the actions."""
    state, states = data.states[:, 0], []
    for t in range(data.actions.shape[1]):
        out = step(torch.cat([state, data.actions[:, t]], -1))
        state = state + out if residual else out
        states.append(state)
    return torch.stack(states, 1)


@torch.no_grad()
def prediction_error(net: Step, data: Trajectories, residual: bool = True) -> float:
    """Root mean square error of T-step predictions, in units of the usual change in a step."""
    miss = (_ahead(net, data, residual) - data.states[:, 1:]) / data.scale()
    return float(miss.square().mean().sqrt())


@dataclass(frozen=True, kw_only=True)
class Thinning:
    """How a network is thinned.

    Parameters
    ----------
    relus : ReLUs left in the end. steps : updates while they go. finetune : updates after that.
    lr : of Adam, for weights; kinds learn ten times as fast.
    penalty : cost of one ReLU above the budget, in units of the mean squared error.
    temperature : of the Gumbel-softmax, at the start and in the end, geometric in between.
    batch_size, seed : of the order of the data and the draws.
    residual : the network predicts the change of the state.
    """

    relus: int
    steps: int
    finetune: int
    lr: float = 3e-3
    penalty: float = 0.1
    temperature: tuple[float, float] = (2.0, 0.2)
    batch_size: int = 256
    seed: int = 0
    residual: bool = True


def budget_at(step: int, steps: int, units: int, relus: int) -> float:
    """ReLUs allowed at an update: all at first, ``relus`` from 70 % of the updates on, linear."""
    return max(float(relus), units - (units - relus) * step / max(1.0, 0.7 * steps))


def _rows(count: int, plan: Thinning, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (min(count, plan.batch_size),), generator=generator)


def _loss(step: Step, batch: Trajectories, scale: Tensor, residual: bool) -> Tensor:
    return ((_ahead(step, batch, residual) - batch.states[:, 1:]) / scale).square().mean()


def _finite(loss: Tensor, step: int, plan: Thinning) -> None:
    if not bool(loss.isfinite()):
        raise GossamerError(
            f"the prediction error is {float(loss)} at update {step + 1}; lower the learning rate "
            f"(lr is {plan.lr:g})"
        )


def _parameters(net: SparseNet) -> tuple[list[Tensor], list[Tensor]]:
    weights = [w.detach().clone().requires_grad_() for w in net.weights]
    return weights, [b.detach().clone().requires_grad_() for b in net.biases]


def thin(
    net: SparseNet, data: Trajectories, plan: Thinning, progress: Progress | None = None
) -> tuple[SparseNet, list[Tensor]]:
    """Train weights and kinds together under the shrinking budget.

    Returns
    -------
    The network with its trained weights, every unit still a ReLU, and the probabilities of the
    kinds (U, 3) of every hidden layer; :func:`discretise` turns both into one.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    weights, biases = _parameters(net)
    logits = [weights[0].new_zeros(len(k), 3, requires_grad=True) for k in net.kinds]
    optimizer = torch.optim.Adam(
        [
            {"params": [*weights, *biases], "lr": plan.lr},
            {"params": logits, "lr": 10 * plan.lr},
        ]
    )
    scale, first, last = data.scale(), *plan.temperature
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        for step in range(plan.steps):
            share = step / max(1, plan.steps - 1)
            tau = first * (last / first) ** share
            gates = [gumbel_softmax(one, tau, hard=True) for one in logits]

            def run(x: Tensor, gates: list[Tensor] = gates) -> Tensor:
                for weight, bias, gate in zip(weights, biases, gates, strict=False):
                    x = gated(linear(x, weight, bias), gate)
                return linear(x, weights[-1], biases[-1])

            loss = _loss(run, data.rows(_rows(len(data), plan, generator)), scale, plan.residual)
            _finite(loss.detach(), step, plan)
            expected = torch.cat([one.softmax(1)[:, RELU] for one in logits]).sum()
            over = (expected - budget_at(step, plan.steps, net.units, plan.relus)).relu()
            optimizer.zero_grad()
            (loss + plan.penalty * over).backward()
            optimizer.step()
            if progress is not None:
                what = f"dynamics, {float(expected.detach()):.1f} ReLUs expected"
                progress(step + 1, plan.steps + plan.finetune, what)
    trained = tuple(w.detach() for w in weights), tuple(b.detach() for b in biases)
    return SparseNet(*trained, net.kinds), [one.detach().softmax(1) for one in logits]


def discretise(net: SparseNet, chances: list[Tensor], relus: int) -> SparseNet:
    """Every unit takes its likeliest kind, and at most ``relus`` units stay ReLUs.

    The likeliest ReLUs stay where more would; ties go to the lower unit.
    """
    flat = torch.cat(chances)
    best = flat.argmax(1)
    order = flat[:, RELU].masked_fill(best != RELU, -1).argsort(descending=True, stable=True)
    demoted = order[relus:]
    demoted = demoted[best[demoted] == RELU]
    best[demoted] = 1 + flat[demoted, 1:].argmax(1)
    kinds = best.split([len(one) for one in chances])
    return SparseNet(net.weights, net.biases, tuple(kinds))


def fit(
    net: SparseNet,
    data: Trajectories,
    plan: Thinning,
    progress: Progress | None = None,
) -> SparseNet:
    """Train the weights with the kinds fixed, ``plan.finetune`` updates at a falling rate.

    Units that are zero do not train; their weights stay what they were.
    """
    generator = torch.Generator().manual_seed(plan.seed + 1)
    weights, biases = _parameters(net)
    optimizer = torch.optim.Adam([*weights, *biases], lr=plan.lr)
    scale = data.scale()
    with torch.enable_grad():
        for step in range(plan.finetune):
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * (1 - step / plan.finetune)
            live = SparseNet(tuple(weights), tuple(biases), net.kinds)
            loss = _loss(live, data.rows(_rows(len(data), plan, generator)), scale, plan.residual)
            _finite(loss.detach(), step, plan)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*weights, *biases], 1.0)
            optimizer.step()
            if progress is not None:
                progress(plan.steps + step + 1, plan.steps + plan.finetune, "dynamics, fine-tuning")
    trained = tuple(w.detach() for w in weights), tuple(b.detach() for b in biases)
    return SparseNet(*trained, net.kinds)
