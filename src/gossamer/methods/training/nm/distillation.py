"""Self-distillation: the dense model a training began with teaches the sparse one.

The loss that the model computes itself is mixed with its divergence from the teacher, by a hook on
its forward pass, so that any loop, transformers' Trainer included, trains on both.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.layers import plain_module
from gossamer.methods.training.sparsifier.layout import here, is_sharded

if TYPE_CHECKING:
    from gossamer.methods.training.nm.base import BehindMask

__all__ = ["Frozen", "check_teacher", "divergence", "frozen_copy", "mixing", "teacher_of"]

_DENSE = "give the dense model that this training began with"
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


def teacher_of(
    method: "BehindMask", model: nn.Module, given: nn.Module | None, *, resumed: bool
) -> nn.Module | None:
    """The dense model that a method asks: the one given, or a copy of the model.

    Raises
    ------
    GossamerError
        If the one given cannot teach, or none is given to a training that goes on.
    """
    if given is not None:
        check_teacher(given, model, method.key())
    if not method.distilled_share:
        return None
    if given is None and resumed:
        raise GossamerError(
            f"going on with {method.key()} needs the dense model it began with; "
            "attach with teacher=, or train with distill=0"
        )
    return frozen_copy(model, method.key()) if given is None else given


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


def check_teacher(teacher: Any, model: nn.Module, key: str) -> None:
    """Refuse what cannot teach a model, before anything is changed.

    Raises
    ------
    GossamerError
        If it is no module, is the model or shares weights with it, or has another vocabulary.
    """
    ours, theirs = plain_module(model), plain_module(teacher, "the teacher")
    cure = f"attach with teacher=copy.deepcopy(model), or leave it out: {key} then copies the model"
    if ours is theirs:
        raise GossamerError(f"the teacher is the model itself, which trains; {cure}")
    known = {place for p in ours.parameters() for place in _places(p)}
    for name, parameter in theirs.named_parameters():
        if known.intersection(_places(parameter)):
            raise GossamerError(f"the teacher shares {name} with the model, which trains; {cure}")
    sizes = [getattr(getattr(m, "config", None), "vocab_size", None) for m in (ours, theirs)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise GossamerError(
            f"the teacher has a vocabulary of {sizes[1]}, the model of {sizes[0]}; give the dense "
            "model that this training began with"
        )


def _places(parameter: nn.Parameter) -> set[int]:
    """What tells a parameter, and the memory it lies in."""
    local = here(parameter.detach())
    return {id(parameter)} | ({local.data_ptr()} if local.numel() else set()) - {0}


class Frozen:
    """A teacher at work, frozen and in evaluation mode until :meth:`remove`: a hook's handle."""

    def __init__(self, teacher: nn.Module | None) -> None:
        self.modes = [(m, m.training) for m in teacher.modules()] if teacher else []
        self.wanted = [(p, p.requires_grad) for p in teacher.parameters()] if teacher else []
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    def remove(self) -> None:
        """Put modes and wishes for gradients back."""
        for module, mode in self.modes:
            module.training = mode
        for parameter, wanted in self.wanted:
            parameter.requires_grad_(wanted)


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
        theirs = _asked(teacher, args, given, kind)
        if theirs.shape != output.logits.shape:
            raise GossamerError(
                f"the teacher gives logits of shape {tuple(theirs.shape)}, the model of "
                f"{tuple(output.logits.shape)}; {_DENSE}"
            )
        where = given.get("attention_mask")
        if where is None or where.shape != output.logits.shape[:-1]:
            where = None
        far = divergence(output.logits, theirs, temperature, where)
        if given.get("num_items_in_batch") is not None:
            far = far * _share_of_update(module, given)
        output.loss = (1.0 - share) * loss + share * far
        return output

    return hook


def _asked(
    teacher: nn.Module, args: Any, given: Mapping[str, Any], kind: torch.dtype | None
) -> Tensor:
    """The teacher's logits on what the model was given."""
    asked = {k: _as(v, kind) for k, v in given.items() if k not in _LABELS}
    try:
        with torch.no_grad():
            return teacher(*(_as(value, kind) for value in args), **asked).logits
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise GossamerError(
            f"the teacher, a {type(teacher).__name__}, gives no logits for the model's batch "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); {_DENSE}"
        ) from error


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
