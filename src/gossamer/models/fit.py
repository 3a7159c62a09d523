"""One training loop: a seeded order, a model's own loss, and nothing left behind.

A method says how long and how fast, and may watch the optimizer; order, learning rate, clipping,
progress, and putting back modes, gradients and random state are decided here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, check_count, unknown
from gossamer.models.calibrate import Progress
from gossamer.models.data import Inputs, Tokens
from gossamer.models.gradient import own_loss
from gossamer.models.loading import first_line

__all__ = ["FitPlan", "batches", "fit", "in_float32", "meeting", "undisturbed"]

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
Watch = Callable[[torch.optim.Optimizer], Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """How long and how fast.

    Parameters
    ----------
    steps : optimizer updates; 0 trains nothing. batch_size : samples of an update.
    lr : peak learning rate; it rises linearly over the first share ``warmup`` of the updates, and
        falls linearly to 0 over the last share ``decay``.
    weight_decay : on matrices only. clip : largest norm of an update's gradients, or None.
    optimizer : ``adamw`` (betas 0.9 and 0.95), or ``sgd`` with momentum 0.9.
    seed : order of the samples, and what a model draws while it trains (dropout).
    """

    steps: int
    lr: float
    batch_size: int = 8
    warmup: float = 0.05
    decay: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0)
        check_count("batch_size", self.batch_size, 1)
        check_count("seed", self.seed, 0)
        for name in ("lr", "warmup", "decay", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not isfinite(value) or value < 0:
                raise GossamerError(f"{name} is {value!r}; give a number of at least 0")
        if self.lr == 0:
            raise GossamerError("lr is 0, so nothing would be learned; give a number above 0")
        if max(self.warmup, self.decay) > 1:
            raise GossamerError(
                f"warmup {self.warmup!r} and decay {self.decay!r} are shares of the steps, 0 to 1"
            )
        if self.clip is not None and not self.clip > 0:
            raise GossamerError(f"clip is {self.clip!r}; give a norm above 0, or None")
        if self.optimizer not in ("adamw", "sgd"):
            raise unknown("optimizer", self.optimizer, ("adamw", "sgd"))

    def rate(self, step: int) -> float:
        """Learning rate of an update, counted from 0."""
        rising = (step + 1) / max(1.0, self.warmup * self.steps)
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, rising, falling)


def batches(
    data: Tokens | Inputs, plan: FitPlan, device: torch.device | str | None = None
) -> Iterator[dict[str, Tensor]]:
    """One batch for every update: whole passes over the data, each in a new order."""
    generator = torch.Generator().manual_seed(plan.seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(plan.steps):
        while len(left) < plan.batch_size:
            left = torch.cat([left, torch.randperm(len(data), generator=generator)])
        rows, left = left[: plan.batch_size], left[plan.batch_size :]
        part: Tokens | Inputs
        if isinstance(data, Tokens):
            part = Tokens(data.input_ids[rows], data.attention_mask[rows])
        else:
            part = Inputs({name: value[rows] for name, value in data.values.items()})
        yield next(part.batches(len(rows), device))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back modes, gradients, which parameters want them, and torch's random state."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    # Classifiers of transformers note in their configuration which loss their labels meant.
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, wanted, gradient in gradients:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        if config is not None and getattr(config, "problem_type", None) != problem:
            config.problem_type = problem


@contextmanager
def meeting(
    model: nn.Module, batch: Mapping[str, Tensor], which: str = "the first batch"
) -> Iterator[None]:
    """Around the first forward pass on some data: what torch says of a mismatch, in one line.

    Raises
    ------
    GossamerError
        With torch's message and the shapes of the batch.
    """
    try:
        yield
    except (GossamerError, NotImplementedError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
        raise GossamerError(
            f"{type(model).__name__} failed on {which}, {shapes}: {first_line(error)}; "
            "give data of the shapes and classes the model takes"
        ) from error


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Hold half-precision parameters and buffers in float32, and round them back on exit.

    Updates below the spacing of bfloat16 would otherwise be lost.
    """
    held = [*model.parameters(), *model.buffers()]
    halves = [(t, t.dtype) for t in held if t.is_floating_point() and t.element_size() < 4]
    try:
        for tensor, _ in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)


def _optimizer(parameters: list[nn.Parameter], plan: FitPlan) -> torch.optim.Optimizer:
    # Decay pulls matrices towards zero; norms and biases are no matrices.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95))


def fit(
    model: nn.Module,
    data: Tokens | Inputs,
    plan: FitPlan,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
    watch: Watch | None = None,
    loss: Loss = own_loss,
    progress: Progress | None = None,
    what: str = "training",
    done: int = 0,
) -> tuple[float, ...]:
    """Train a model in place.

    Parameters
    ----------
    parameters : what trains; None for all that want gradients.
    watch : gets the optimizer before the first update; what it returns runs after every update.
    loss : (model, batch) to a scalar; the model's own by default.
    progress : called with (updates done, updates, what).
    done : updates of the plan that lie behind: goes on with the batch and the rate after them.

    Returns
    -------
    The loss before every update. Modes, gradients and torch's random state are as before; the
    weights are the trained ones, also after an error.

    Raises
    ------
    GossamerError
        If nothing is trainable, the data do not fit the model or have nothing to predict, the
        model has no loss on them, or the loss stops being a number.
    """
    if loss is own_loss and isinstance(data, Tokens) and int(data.attention_mask.sum(1).max()) < 2:
        raise GossamerError(
            "the windows hold one token each, which leaves no next one to predict; give windows of "
            "at least two tokens"
        )
    given = model.parameters() if parameters is None else parameters
    chosen = [p for p in given if p.is_floating_point()]
    chosen = [p for p in chosen if parameters is not None or p.requires_grad]
    if not chosen:
        raise GossamerError("no parameter of the model is trainable; set requires_grad on some")
    losses: list[float] = []
    with undisturbed(model), torch.enable_grad():
        wanted = {id(p) for p in chosen}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        torch.manual_seed(plan.seed)
        model.train()
        optimizer = _optimizer(chosen, plan)
        after = watch(optimizer) if watch is not None else None
        left = islice(batches(data, plan, chosen[0].device), done, None)
        for step, batch in enumerate(left, done):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
            with nullcontext() if losses else meeting(model, batch):
                value = loss(model, batch)
            losses.append(float(value.detach()))
            if not isfinite(losses[-1]):
                raise GossamerError(
                    f"the loss is {losses[-1]} at step {step + 1} of {plan.steps}; "
                    f"lower the learning rate (lr is {plan.lr:g})"
                )
            value.backward()
            if plan.clip is not None:
                nn.utils.clip_grad_norm_(chosen, plan.clip)
            optimizer.step()
            if after is not None:
                after()
            optimizer.zero_grad(set_to_none=True)
            if progress is not None:
                progress(step + 1, plan.steps, f"{what}, loss {losses[-1]:.3f}")
    return tuple(losses)
