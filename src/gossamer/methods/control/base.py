"""The protocol of the control family: contrast labelled texts, end in an Intervention.

The intervention and its laws are those of the features family, so that directions, learned maps,
circuits, clamped latents and suppressed concepts are one kind of object.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.features.editing import (
    Affine,
    Edit,
    Intervention,
    Plan,
    SteeredModel,
    SteeringMethod,
)
from gossamer.models import Tokens, find_sites
from gossamer.models.labelled import Labelled

__all__ = [
    "Affine",
    "ContrastMethod",
    "Edit",
    "Intervention",
    "Plan",
    "SteeredModel",
    "SteeringMethod",
    "norm_paths",
]

_NORMS = ("norm", "ln_")


@dataclass(frozen=True, kw_only=True)
class ContrastMethod(SteeringMethod):
    """Base of the methods that move texts of one value of an attribute towards another.

    Parameters
    ----------
    source : value to start from; None: all windows that do not have the target.
    """

    source: str | None = None

    def resolved(self, data: Labelled) -> Any:
        made = super().resolved(data)
        if self.source == made.target:
            raise GossamerError(f"source and target are both {self.source!r}; name two values")
        if self.source is not None:
            data.number(self.attribute, self.source)
        elif len(data.codes(self.attribute).unique()) < 2:
            raise GossamerError(f"all windows are {made.target!r}; give some of another value too")
        return replace(made, source=self.source)

    def sides(self, data: Labelled) -> tuple[Tokens, Tokens]:
        """Windows to start from, and windows to end like."""
        assert self.target is not None
        if self.source is not None:
            start = data.where(self.attribute, self.source)
        else:
            codes = data.codes(self.attribute)
            start = data.at(codes != data.number(self.attribute, self.target))
        return start, data.where(self.attribute, self.target)


def norm_paths(model: nn.Module) -> tuple[str, ...]:
    """Normalisations to steer behind: of every block those named "post", else its last one.

    Raises
    ------
    GossamerError
        If the blocks have none.
    """
    found: list[str] = []
    for block in find_sites(model).blocks:
        own = [
            f"{block}.{name}"
            for name, module in model.get_submodule(block).named_modules()
            if any(part in name.rpartition(".")[2].lower() for part in _NORMS)
            and not list(module.children())
            and "attn" not in name
        ]
        post = [path for path in own if "post" in path.rpartition(".")[2]]
        found += post or own[-1:]
    if not found:
        raise GossamerError("the blocks have no normalisation; name modules with hooks")
    return tuple(found)
