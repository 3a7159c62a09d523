"""Adam's update where a pull on removed weights joins the first moment, not the gradient.

Added to the gradient, a decay is divided by the root of the second moment and remembered by the
first one; here the first moment is that of the loss alone, and the pull is of this update only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["Decay", "adam_step", "check_adam", "start_adam"]


@dataclass(frozen=True)
class Decay:
    """What pulls removed weights towards zero at one update.

    Parameters
    ----------
    pull : its strength λ. toward : ``weight`` pulls by λ w, ``sign`` by λ sign(w).
    into : ``gradient`` adds it to the gradient, for any optimizer; ``moment`` to Adam's first
        moment as this update uses it.
    keep : share of the first moment that removed weights still follow; of ``moment`` only.
    """

    pull: float
    into: Literal["gradient", "moment"] = "gradient"
    toward: Literal["weight", "sign"] = "weight"
    keep: float = 1.0

    def term(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The pull on every weight, zero on those the mask keeps."""
        value = weight.sign() if self.toward == "sign" else weight
        return (value * ~mask).mul_(self.pull)


def check_adam(optimizer: torch.optim.Optimizer, key: str) -> None:
    """Refuse an optimizer whose update is not plain Adam's.

    Raises
    ------
    GossamerError
        Naming what it is, or the option that is on.
    """
    if not isinstance(optimizer, torch.optim.Adam):
        raise GossamerError(
            f"{key} changes Adam's update, the optimizer is a {type(optimizer).__name__}; "
            "attach to torch.optim.Adam or AdamW"
        )
    for name in ("amsgrad", "maximize", "capturable"):
        if any(group.get(name) for group in optimizer.param_groups):
            raise GossamerError(f"{key} changes Adam's update and knows it without {name} only")


def start_adam(weight: Tensor, state: dict[str, Any], *, fused: bool = False) -> None:
    """Adam's state before the first update, under torch's names and where torch keeps it."""
    state["step"] = torch.zeros((), device=weight.device if fused else None)
    state["exp_avg"] = torch.zeros_like(weight)
    state["exp_avg_sq"] = torch.zeros_like(weight)


@torch.no_grad()
def adam_step(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    group: Mapping[str, Any],
    *,
    mask: Tensor | None = None,
    decay: Decay | None = None,
) -> None:
    """Update a weight in place; ``state`` takes the names of torch's Adam.

    Parameters
    ----------
    group : ``lr``, ``betas``, ``eps``, ``weight_decay`` and whether that is decoupled.
    mask, decay : where weights are removed, and what pulls them; without, this is Adam.

    With m the moment of the gradient, removed weights follow u = keep · m + pull, kept ones
    u = m; the second moment is that of u, where Adam's is the gradient's: steps are larger than
    Adam's wherever gradients change sign, and much so at first, which a warm-up softens. Both
    moments are corrected for their start at zero.
    """
    if not state:
        start_adam(weight, state)
    state["step"] += 1
    step = float(state["step"])
    first, second = group["betas"]
    lr, size = float(group["lr"]), float(group.get("weight_decay", 0.0))
    if size and group.get("decoupled_weight_decay", False):
        weight.mul_(1.0 - lr * size)
    elif size:
        gradient = gradient + size * weight
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1.0 - first)
    moved, squared = mean, gradient
    if decay is not None:
        assert mask is not None
        moved = torch.where(mask, mean, mean * decay.keep) + decay.term(weight, mask)
        squared = moved
    square.mul_(second).addcmul_(squared, squared, value=1.0 - second)
    root = (square / (1.0 - second**step)).sqrt_().add_(group["eps"])
    weight.addcdiv_(moved, root, value=-lr / (1.0 - first**step))
