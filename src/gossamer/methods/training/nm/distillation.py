"""Self-distillation: the dense model a training began with teaches the sparse one.

The loss that the model computes itself is mixed with its divergence from the teacher, by a hook on
its forward pass, so that any loop, transformers' Trainer included, trains on both.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.layers import plain_module
from gossamer.methods.training.sparsifier.layout import is_sharded

__all__ = ["divergence", "frozen_copy", "mixing"]

_LABELS = ("labels", "num_items_in_batch")


def divergence(
    logits: Tensor, teacher: Tensor, temperature: float = 1.0, where: Tensor | None = None
) -> Tensor:
    """T² KL(teacher ‖ student), the mean over positions, in nats.

    Parameters
    ----------
    logits, teacher : (..., classes). temperature : T; both sets of logits are divided by it.
    where : positions that count, the leading sides of the logits; all by default.
    """
    ours = (logits.float() / temperature).log_softmax(-1)
    theirs = (teacher.float() / temperature).log_softmax(-1)
    found = kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    if where is None:
        return temperature**2 * found.mean()
    wanted = where.to(found)
    return temperature**2 * (found * wanted).sum() / wanted.sum().clamp(min=1.0)


def frozen_copy(model: nn.Module, key: str) -> nn.Module:
    """The dense model as it now is, for teaching.

    Raises
    ------
    GossamerError
        If its parameters lie over processes, of which no copy can be made.
    """
    plain = plain_module(model)
    if any(map(is_sharded, plain.parameters())):
        raise GossamerError(
            f"{key} learns from the dense model, and a model sharded by fully_shard cannot be "
            "copied; attach with teacher= (a copy made before sharding, which may be sharded as "
            "well), or train with distill=0"
        )
    return deepcopy(plain)


def mixing(teacher: nn.Module, share: float, temperature: float) -> Callable[..., Any]:
    """A forward hook: loss becomes (1 - share) · loss + share · T² KL.

    Passes without a loss that wants gradients (evaluation, generation) stay as they are. Where
    the model divides its loss by the tokens of a whole update (``num_items_in_batch``), of which
    this pass is a part, the divergence counts for that part as well.
    """

    kind = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), None)

    def hook(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        loss = getattr(output, "loss", None)
        if loss is None:
            if not module.training:
                return None
            raise GossamerError(
                f"{type(module).__name__} returns no loss to mix distillation with; "
                "train a model that computes its loss, or set distill=0"
            )
        with torch.no_grad():
            asked = {k: _as(v, kind) for k, v in given.items() if k not in _LABELS}
            theirs = teacher(*(_as(value, kind) for value in args), **asked).logits
        where = given.get("attention_mask")
        if where is None or where.shape != output.logits.shape[:-1]:
            where = None
        far = divergence(output.logits, theirs, temperature, where)
        if given.get("num_items_in_batch") is not None:
            far = far * _share_of_update(module, given)
        output.loss = (1.0 - share) * loss + share * far
        return output

    return hook


def _share_of_update(module: nn.Module, given: Mapping[str, Any]) -> Any:
    """Share of an update's predicted tokens that this pass holds."""
    labels = given.get("shift_labels")
    if labels is None:
        labels = given["labels"]
        if getattr(module, "loss_type", None) == "ForCausalLM":
            labels = labels[..., 1:]
    return labels.ne(-100).sum() / given["num_items_in_batch"]


def _as(value: Any, kind: torch.dtype | None) -> Any:
    """Inputs in the teacher's precision: mixed precision may have cast them to the student's."""
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(kind) if floats and kind is not None else value
