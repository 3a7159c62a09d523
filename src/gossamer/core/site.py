"""Site: a matrix of a model, named by the role it plays."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

__all__ = ["ROLES", "Site"]

ROLES = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.qkv",
    "attention.o",
    "mlp.gate",
    "mlp.up",
    "mlp.gate_up",
    "mlp.down",
    "experts.gate_up",
    "experts.down",
    "experts.router",
)


@dataclass(frozen=True)
class Site:
    """A weight matrix of a model by role, shown as (out, in) however it is stored.

    Parameters
    ----------
    name : unique in the model; the module's path, with ``[e]`` for expert e of a stack.
    role : one of :data:`ROLES`. A model without gate calls its two MLP matrices up and down.
    block : index of the decoder or encoder block.
    module : path of the module that owns the parameter.
    parameter : name of the parameter in the module.
    shape : (O, I).
    transposed : the parameter is stored (I, O), as in GPT-2's Conv1D.
    expert : index into a stacked parameter (E, ., .), or None.
    coupled : names of sites that must change together with this one.
    """

    name: str
    role: str
    block: int
    module: str
    parameter: str
    shape: tuple[int, int]
    transposed: bool = False
    expert: int | None = None
    coupled: tuple[str, ...] = ()

    def owner(self, model: nn.Module) -> nn.Module:
        """The module that holds the parameter."""
        return model.get_submodule(self.module)

    def weight(self, model: nn.Module) -> Tensor:
        """The (O, I) matrix as a detached view: writing to it changes the model."""
        tensor = getattr(self.owner(model), self.parameter).detach()
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor.T if self.transposed else tensor

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @torch.no_grad()
    def write(self, model: nn.Module, weight: Tensor) -> None:
        """Replace the (O, I) matrix in place, in the parameter's own dtype."""
        self.weight(model).copy_(weight)
