"""Finetune: an ordinary training loop under fixed masks.

The same loop recovers a pruned model, makes the members of a soup, and serves any module that
computes a loss.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, check_count, unknown
from gossamer.methods.weights.retrain.masks import Masks, holding, mask_gradients
from gossamer.models import Inputs, Progress, Tokens
from gossamer.models.fit import undisturbed
from gossamer.models.gradient import own_loss

__all__ = ["Plan", "batch_of", "finetune", "orders"]

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a network is retrained.

    The learning rate starts anew: it rises over the warm-up and falls linearly to zero.

    Parameters
    ----------
    steps : optimizer updates. batch_size : windows or samples of an update.
    lr : peak learning rate. weight_decay : decoupled for AdamW, added to gradients for SGD.
    warmup : share of the steps over which the rate rises, 0 to 1.
    clip : largest norm of a step's gradients, or None.
    optimizer : ``adamw``, or ``sgd`` with momentum 0.9.
    seed : order of the data, and what a model draws while it trains (dropout).
    """

    steps: int
    batch_size: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.1
    clip: float | None = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0)
        check_count("batch_size", self.batch_size, 1)
        check_count("seed", self.seed, 0)
        for name, low in (("lr", 0.0), ("weight_decay", 0.0), ("warmup", 0.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not isfinite(value) or value < low:
                raise GossamerError(f"{name} is {value!r}; give a number of at least {low:g}")
        if self.lr == 0:
            raise GossamerError("lr is 0, so nothing would be learned; give a number above 0")
        if self.warmup > 1:
            raise GossamerError(f"warmup is {self.warmup!r}; it is a share of the steps, 0 to 1")
        if self.clip is not None and not self.clip > 0:
            raise GossamerError(f"clip is {self.clip!r}; give a norm above 0, or None")
        if self.optimizer not in ("adamw", "sgd"):
            raise unknown("optimizer", self.optimizer, ("adamw", "sgd"))

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at an update, counted from 0."""
        rising = (step + 1) / (self.warmup * self.steps + 1)
        return min(1.0, rising, (self.steps - step) / max(1.0, self.steps * (1 - self.warmup)))

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def orders(count: int, plan: Plan) -> Iterator[Tensor]:
    """Rows of every update: whole passes over the data, each in a new order drawn by the seed."""
    generator = torch.Generator().manual_seed(plan.seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(plan.steps):
        parts: list[Tensor] = []
        missing = plan.batch_size
        while missing:
            if not len(left):
                left = torch.randperm(count, generator=generator)
            parts.append(left[:missing])
            left = left[missing:]
            missing -= len(parts[-1])
        yield torch.cat(parts)


def batch_of(
    data: Tokens | Inputs, rows: Tensor, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Some windows or samples as keyword arguments of a model."""
    part: Tokens | Inputs
    if isinstance(data, Tokens):
        part = Tokens(data.input_ids[rows], data.attention_mask[rows])
    else:
        part = Inputs({name: value[rows] for name, value in data.values.items()})
    return next(part.batches(len(rows), device))


def _optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    if not parameters:
        raise GossamerError("no parameter of the model is trainable; set requires_grad on some")
    # Decay pulls matrices towards zero; norms and biases are no matrices.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95))


def finetune(
    model: nn.Module,
    data: Tokens | Inputs,
    masks: Masks,
    plan: Plan,
    *,
    loss: Loss = own_loss,
    progress: Progress | None = None,
    what: str = "retraining",
) -> list[float]:
    """Train a model in place with some weights held at zero.

    Parameters
    ----------
    data : what is trained on, drawn in an order the plan's seed fixes.
    masks : parameter path to bool mask, True where kept; see :func:`holding`. Parameters without
        a mask train freely; those with ``requires_grad`` off do not train.
    loss : (model, batch) to a scalar; the model's own loss by default.
    progress : called with (updates done, updates, what).

    Returns
    -------
    The loss before every update. Modes, gradients and torch's random state are as before; the
    weights are the trained ones, also after an error.

    Raises
    ------
    GossamerError
        If the model has no loss on this data, or the loss stops being a number.
    """
    device = next(model.parameters()).device
    losses: list[float] = []
    with undisturbed(model), torch.enable_grad():
        torch.manual_seed(plan.seed)
        model.train()
        optimizer = _optimizer(model, plan)
        trained: list[Tensor] = [p for g in optimizer.param_groups for p in g["params"]]
        for parameter in model.parameters():
            parameter.grad = None
        with holding(optimizer, model, masks) as pairs:
            for step, rows in enumerate(orders(len(data), plan)):
                for group in optimizer.param_groups:
                    group["lr"] = plan.lr * plan.rate(step)
                value = loss(model, batch_of(data, rows, device))
                losses.append(float(value.detach()))
                if not isfinite(losses[-1]):
                    raise GossamerError(
                        f"the loss is {losses[-1]} at step {step + 1} of {plan.steps}; "
                        f"lower the learning rate (lr is {plan.lr:g})"
                    )
                value.backward()
                if plan.clip is not None:
                    mask_gradients(pairs)
                    nn.utils.clip_grad_norm_(trained, plan.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if progress is not None:
                    progress(step + 1, plan.steps, what)
    return losses
