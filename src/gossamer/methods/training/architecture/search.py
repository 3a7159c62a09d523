"""The search: weights and scores learn on one part of the data, the architecture on the other.

Both the search and the training of what it found go through three phases: all weights train;
scores learn, weights held, which of them stay; the weights that stay train on.
Shapes: N samples, C classes.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.core import GossamerError
from gossamer.methods.training.architecture.masked import Phase, masked_layers, sparse
from gossamer.methods.training.architecture.space import MixedOp, decided, mixed_ops
from gossamer.models import Progress

__all__ = [
    "Found",
    "Objective",
    "SearchPlan",
    "Trainer",
    "batches",
    "parted",
    "search",
    "train_found",
]

Objective = Literal["sparse", "dense", "random"]
Samples = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """How to search and train: see :class:`~gossamer.methods.training.dass.DASS`."""

    sparsity: float
    search: Objective
    pretrain: int
    learn: int
    tune: int
    batch_size: int
    lr: float
    score_lr: float
    alpha_lr: float
    validation: float
    seed: int

    @property
    def updates(self) -> int:
        """Of weights or scores, in one pass through the phases."""
        return self.pretrain + self.learn + self.tune


@dataclass(frozen=True)
class Found:
    """What a search found.

    Parameters
    ----------
    architecture : place to operation. chances : place to operation to its share at the end.
    updates, decisions : of weights or scores, and of the architecture's parameters.
    """

    architecture: dict[str, str]
    chances: dict[str, dict[str, float]]
    updates: int = 0
    decisions: int = 0


def parted(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places of the samples that weights and scores see, and of those the architecture sees.

    Disjoint, and together all.

    Raises
    ------
    GossamerError
        If one part would be empty.
    """
    held = round(share * count)
    if not 0 < held < count:
        raise GossamerError(
            f"validation {share:g} of {count} samples leaves a part empty; give more samples"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:], order[:held]


def batches(samples: Samples, size: int, generator: torch.Generator) -> Iterator[Samples]:
    """Passes over all samples without end, each in a new order."""
    x, y = samples
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(min(size, len(x))):
            yield x[rows], y[rows]


class Trainer:
    """Updates of a network: only of what is named, so that nothing learns from the wrong part.

    Parameters
    ----------
    report : called after every update with its loss.
    """

    def __init__(
        self, net: nn.Module, plan: SearchPlan, report: Callable[[float], None] | None = None
    ) -> None:
        self.net = net
        self.plan = plan
        self._report = report
        self._layers = list(masked_layers(net).values())
        self._places = [m for m in net.modules() if isinstance(m, MixedOp)]
        self.alphas = [place.alpha for place in self._places]
        self.scores = [layer.scores for layer in self._layers if layer.learned]
        apart = {id(p) for p in (*self.alphas, *(layer.scores for layer in self._layers))}
        self.weights = [p for p in net.parameters() if id(p) not in apart and p.requires_grad]
        self._architect = _adam(self.alphas, plan.alpha_lr, (0.5, 0.999)) if self.alphas else None
        self.decisions = 0

    def enter(self, phase: Phase) -> None:
        """Put all masked layers into a phase."""
        for layer in self._layers:
            layer.enter(phase)

    def update(self, optimizer: torch.optim.Optimizer, batch: Samples) -> float:
        """One step of what the optimizer holds, and of nothing else, on one batch."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        x, y = batch
        loss = cross_entropy(self.net(x), y)
        value = float(loss.detach())
        if not isfinite(value):
            raise GossamerError(f"the loss is {value}; lower lr ({self.plan.lr:g})")
        found = torch.autograd.grad(loss, params, allow_unused=True)
        for parameter, gradient in zip(params, found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for parameter in params:
            parameter.grad = None
        return value

    def decide(self, batch: Samples) -> None:
        """One step of the architecture's parameters, first order, on a validation batch."""
        assert self._architect is not None
        self.update(self._architect, batch)
        self.decisions += 1

    def run(
        self,
        params: list[nn.Parameter],
        lr: float,
        steps: int,
        train: Iterator[Samples],
        held_out: Iterator[Samples] | None = None,
    ) -> None:
        """Train some parameters; with validation batches, decide before every update."""
        if not steps or not params:
            return
        optimizer = _adam(params, lr)
        for step in range(steps):
            if held_out is not None:
                self.decide(next(held_out))
            for group in optimizer.param_groups:
                group["lr"] = lr * (1.0 - step / steps)
            loss = self.update(optimizer, next(train))
            if self._report is not None:
                self._report(loss)

    def phases(self, train: Iterator[Samples], held_out: Iterator[Samples] | None = None) -> None:
        """The three phases, at the target sparsity from the first mask on.

        Parameters
        ----------
        held_out : batches the architecture is decided on, while weights are masked only.
        """
        plan = self.plan
        self.enter("dense")
        self.run(self.weights, plan.lr, plan.pretrain, train)
        self.enter("learning")
        self.run(self.scores, plan.score_lr, plan.learn, train, held_out)
        self.enter("fixed")
        self.run(self.weights, plan.lr, plan.tune, train, held_out)

    def dense(self, train: Iterator[Samples], held_out: Iterator[Samples]) -> None:
        """As many updates of weights and decisions without masks: what the search came from."""
        self.enter("dense")
        self.run(self.weights, self.plan.lr, self.plan.pretrain, train)
        rest = self.plan.learn + self.plan.tune
        self.run(self.weights, self.plan.lr, rest, train, held_out)


def _adam(
    params: list[nn.Parameter], lr: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr, betas=betas)


def search(
    space: nn.Module, data: Samples, plan: SearchPlan, progress: Progress | None = None
) -> Found:
    """Find an architecture; the space is not changed.

    Raises
    ------
    GossamerError
        If the space holds no :class:`MixedOp`, or training diverges.
    """
    places = mixed_ops(space)
    if plan.search == "random":
        generator = torch.Generator().manual_seed(plan.seed)
        drawn: dict[str, str] = {}
        for name, place in places.items():
            names = list(place.choices)
            drawn[name] = names[int(torch.randint(len(names), (1,), generator=generator))]
        return Found(drawn, {name: place.chances() for name, place in places.items()})
    net = _searched(space, plan)
    train, held_out = (
        batches((data[0][rows], data[1][rows]), plan.batch_size, _generator(plan.seed, part))
        for part, rows in enumerate(parted(len(data[0]), plan.validation, plan.seed))
    )
    trainer = Trainer(net, plan, _teller(progress, plan.updates, "searching"))
    (trainer.phases if plan.search == "sparse" else trainer.dense)(train, held_out)
    mixed = mixed_ops(net)
    return Found(
        {name: place.best() for name, place in mixed.items()},
        {name: place.chances() for name, place in mixed.items()},
        plan.updates,
        trainer.decisions,
    )


def _searched(space: nn.Module, plan: SearchPlan) -> nn.Module:
    """A copy of a space to search in: drawn anew, its sparse layers at the target sparsity."""
    net = deepcopy(space).train()
    with torch.random.fork_rng([]):
        torch.manual_seed(plan.seed)
        for module in net.modules():
            renew = getattr(module, "reset_parameters", None)
            if callable(renew):
                renew()
    sparse(net, plan.sparsity, learned=False)
    for place in mixed_ops(net).values():
        nn.init.zeros_(place.alpha)
    return net


def train_found(
    space: nn.Module,
    architecture: dict[str, str],
    data: Samples,
    plan: SearchPlan,
    progress: Progress | None = None,
) -> nn.Module:
    """Train an architecture from scratch on all samples, and prune every layer on the way.

    Returns
    -------
    The network, its layers masked and fixed.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(plan.seed)
        net = decided(space, architecture).train()
    sparse(net, plan.sparsity)
    trainer = Trainer(net, plan, _teller(progress, plan.updates, "training what was found"))
    trainer.phases(batches(data, plan.batch_size, _generator(plan.seed, 2)))
    return net


def _generator(seed: int, part: int) -> torch.Generator:
    return torch.Generator().manual_seed(3 * seed + part)


def _teller(progress: Progress | None, total: int, what: str) -> Callable[[float], None] | None:
    if progress is None:
        return None
    done = 0

    def tell(loss: float) -> None:
        nonlocal done
        done += 1
        progress(done, total, f"{what}, loss {loss:.3f}")

    return tell
