"""One training loop: seeded order, a loss of the model's own plus a term, nothing left behind.

A method says how long and adds its term; order, learning rate, clipping, progress and the
state of gradients are decided here. Shapes: N = samples, B = samples of a step.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, check_count
from gossamer.models import Inputs, Progress, Tokens
from gossamer.models.capture import evaluating
from gossamer.models.gradient import own_loss

__all__ = ["Training", "as_trainable", "check_rate", "fit", "order", "take"]

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how fast.

    Parameters
    ----------
    steps : optimizer updates; 0 trains nothing.
    lr : peak learning rate of AdamW (betas 0.9 and 0.95).
    batch_size : samples of an update.
    seed : of the order of the samples; None takes them as they come, again and again.
    warmup : first share of the updates, over which the rate rises linearly.
    decay : last share of the updates, over which the rate falls linearly to 0.
    weight_decay : decoupled, on matrices only. clip : largest gradient norm.
    """

    steps: int
    lr: float
    batch_size: int
    seed: int | None = 0
    warmup: float = 0.05
    decay: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0)
        check_count("batch_size", self.batch_size, 1)
        if self.seed is not None:
            check_count("seed", self.seed, 0)
        check_rate(self.lr)

    def rate(self, step: int) -> float:
        """Learning rate of an update, counted from 0."""
        rising = (step + 1) / max(1.0, self.warmup * self.steps)
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, rising, falling)


def check_rate(lr: float) -> None:
    """Refuse a learning rate that is not a positive number."""
    if not isinstance(lr, int | float) or not isfinite(lr) or lr <= 0:
        raise GossamerError(f"lr is {lr!r}; give a positive number")


def order(count: int, batch_size: int, seed: int | None) -> Iterator[Tensor]:
    """Endless batches of sample numbers: every pass over the data in a new order.

    Parameters
    ----------
    count : N. batch_size : B; a pass's last batch runs on into the next pass.
    seed : None keeps the order of the data.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch_size:
            new = torch.randperm(count, generator=generator) if generator else torch.arange(count)
            left = torch.cat([left, new])
        yield left[:batch_size]
        left = left[batch_size:]


def take(data: Tokens | Inputs, rows: Tensor) -> Tokens | Inputs:
    """The samples with these numbers."""
    if isinstance(data, Inputs):
        return Inputs({name: value[rows] for name, value in data.values.items()})
    return Tokens(data.input_ids[rows], data.attention_mask[rows])


def as_trainable(model: nn.Module) -> None:
    """Refuse weights too coarse to train.

    Raises
    ------
    GossamerError
        Unless all floating-point weights are float32 or float64.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() < 4:
            raise GossamerError(
                f"{name} is {parameter.dtype}, too coarse for small updates; "
                "load the model in float32 to train it"
            )


def fit(
    model: nn.Module,
    data: Tokens | Inputs,
    plan: Training,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
    extra: Callable[[int], Tensor | None] | None = None,
    loss: Loss = own_loss,
    progress: Progress | None = None,
    what: str = "training",
) -> tuple[float, ...]:
    """Train in place; dropout stays off, so that equal seeds give equal weights.

    Parameters
    ----------
    parameters : what is trained, None for all. Which parameters want gradients, and the gradients
        they hold, are put back afterwards, also after an error or an interrupt.
    extra : step to a term that is added to the loss of the forward pass just done, or None.
    loss : model and batch to the loss; the model's own by default.

    Returns
    -------
    The loss of every step, without the extra term.

    Raises
    ------
    GossamerError
        If the loss stops being finite; the caller undoes what was trained.
    """
    chosen = list(model.parameters() if parameters is None else parameters)
    if not plan.steps:
        return ()
    losses: list[Tensor] = []
    device = next(model.parameters()).device
    batches = order(len(data), plan.batch_size, plan.seed)
    with _learning(model, chosen), evaluating(model), torch.enable_grad():
        adam = _optimizer(chosen, plan)
        for step in range(plan.steps):
            (batch,) = take(data, next(batches)).batches(plan.batch_size, device)
            task = loss(model, batch)
            term = None if extra is None else extra(step)
            (task if term is None else task + term).backward()
            nn.utils.clip_grad_norm_(chosen, plan.clip)
            for group in adam.param_groups:
                group["lr"] = plan.rate(step)
            adam.step()
            adam.zero_grad(set_to_none=True)
            losses.append(task.detach())
            # Looking at the loss waits for the device: every tenth step is often enough.
            if step % 10 == 9 or step + 1 == plan.steps:
                value = float(losses[-1])
                if not isfinite(value):
                    raise GossamerError(
                        f"the loss is {value} at step {step + 1}; lower lr (now {plan.lr:g})"
                    )
                if progress is not None:
                    progress(step + 1, plan.steps, f"{what}, loss {value:.3f}")
    return tuple(torch.stack(losses).tolist())


def _optimizer(parameters: list[nn.Parameter], plan: Training) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=True)


@contextmanager
def _learning(model: nn.Module, chosen: list[nn.Parameter]) -> Iterator[None]:
    """Let only the chosen parameters take gradients; put flags and gradients back."""
    every = list(dict.fromkeys([*model.parameters(), *chosen]))
    before = [(p, p.requires_grad, p.grad) for p in every]
    wanted = {id(p) for p in chosen}
    # Classifiers of transformers note in their configuration which loss their labels meant.
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    try:
        for parameter in every:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, wants, gradient in before:
            parameter.requires_grad_(wants)
            parameter.grad = gradient
        if config is not None and getattr(config, "problem_type", None) != problem:
            config.problem_type = problem
