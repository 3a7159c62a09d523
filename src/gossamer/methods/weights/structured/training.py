"""Training the new modules of a model on tokens, with everything else held fixed.

AdamW with a linear warm-up and a linear fall to zero. Masks may change on the way.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, check_count
from gossamer.methods.weights.structured.rigl import MaskUpdater
from gossamer.models import Inputs, Progress, Tokens
from gossamer.models.gradient import own_loss

__all__ = ["Training", "batches", "check_training", "train"]

_WARMUP = 0.1


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how strongly to train.

    Parameters
    ----------
    steps : optimizer updates. lr : peak learning rate. batch_size : windows of an update.
    seed : order of the windows.
    """

    steps: int
    lr: float
    batch_size: int
    seed: int

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at an update, counted from 0."""
        warm = max(1, round(_WARMUP * self.steps))
        return min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))


def check_training(steps: int, lr: float, batch_size: int) -> None:
    """Refuse numbers that are no training.

    Raises
    ------
    GossamerError
        Naming the value.
    """
    check_count("steps", steps, 0)
    check_count("batch_size", batch_size, 1)
    if not isfinite(lr) or lr <= 0:
        raise GossamerError(f"lr is {lr!r}; give a number above 0")


def batches(
    data: Tokens | Inputs, training: Training, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """One batch for every update: whole passes over the data, each in an order of its own."""
    generator = torch.Generator().manual_seed(training.seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(training.steps):
        while len(left) < training.batch_size:
            left = torch.cat([left, torch.randperm(len(data), generator=generator)])
        rows, left = left[: training.batch_size], left[training.batch_size :]
        if isinstance(data, Tokens):
            part = Tokens(data.input_ids[rows], data.attention_mask[rows])
        else:
            part = Inputs({name: value[rows] for name, value in data.values.items()})
        yield next(part.batches(len(rows), device))


def train(
    model: nn.Module,
    modules: Iterable[nn.Module],
    data: Tokens | Inputs,
    training: Training,
    *,
    updater: Callable[[torch.optim.Optimizer], MaskUpdater] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    progress: Progress | None = None,
    what: str = "training",
) -> list[float]:
    """Train some modules of a model in place.

    The model stays in evaluation mode (no dropout), so that a run is fixed by its seed.

    Parameters
    ----------
    modules : whose parameters train; all others stay as they are.
    updater : makes what changes masks on the way, given the optimizer.
    penalty : added to the loss, such as a weight decay of products.

    Returns
    -------
    The model's loss before every update. ``requires_grad`` and gradients are as before.

    Raises
    ------
    GossamerError
        If the model has no loss on this data, or the loss stops being a number.
    """
    every = list(model.parameters())
    before = [(p, p.requires_grad, p.grad) for p in every]
    own = [parameter for module in modules for parameter in module.parameters()]
    losses: list[float] = []
    try:
        for parameter in every:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in own:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(own, lr=training.lr, betas=(0.9, 0.95), weight_decay=0.0)
        masks = None if updater is None else updater(optimizer)
        with torch.enable_grad():
            for step, batch in enumerate(batches(data, training, every[0].device)):
                for group in optimizer.param_groups:
                    group["lr"] = training.lr * training.rate(step)
                if masks is not None:
                    masks.begin(step)
                value = own_loss(model, batch)
                losses.append(float(value.detach()))
                if not isfinite(losses[-1]):
                    raise GossamerError(
                        f"the loss is {losses[-1]} at step {step + 1} of {training.steps}; "
                        f"lower the learning rate (lr is {training.lr:g})"
                    )
                (value if penalty is None else value + penalty()).backward()
                if masks is None or not masks.step():
                    nn.utils.clip_grad_norm_(own, 1.0)
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if progress is not None:
                    progress(step + 1, training.steps, f"{what}, loss {losses[-1]:.3f}")
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
    return losses
