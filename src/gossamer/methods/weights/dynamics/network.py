"""SparseNet: a perceptron whose hidden units are each a ReLU, the identity, or nothing.

Shapes: S state and A action components, U units of a hidden layer.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer.core import GossamerError, UnsupportedModel

__all__ = ["IDENTITY", "KINDS", "RELU", "ZERO", "SparseNet", "chain", "check_chain", "gated"]

RELU, IDENTITY, ZERO = 0, 1, 2
KINDS = ("ReLU", "identity", "zero")


def gated(a: Tensor, gates: Tensor) -> Tensor:
    """Units' outputs from their inputs (..., U) and the weight of each kind (U, 3)."""
    return gates[:, RELU] * a.relu() + gates[:, IDENTITY] * a


@dataclass(frozen=True, eq=False)
class SparseNet:
    """Affine layers with units of fixed kinds between them.

    Parameters
    ----------
    weights, biases : of every layer, (outputs, inputs) and (outputs,).
    kinds : int64 (U,) of every hidden layer: 0 ReLU, 1 identity, 2 zero.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    kinds: tuple[Tensor, ...]

    @classmethod
    def dense(cls, model: nn.Module) -> "SparseNet":
        """A model of linear layers and ReLUs as it is: every unit a ReLU."""
        linears, _ = chain(model)
        return cls(
            tuple(layer.weight.detach().clone() for layer in linears),
            tuple(layer.bias.detach().clone() for layer in linears),
            tuple(layer.weight.new_zeros(layer.out_features).long() for layer in linears[:-1]),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        for weight, bias, kinds in zip(self.weights, self.biases, self.kinds, strict=False):
            a = linear(x, weight, bias)
            x = torch.where(kinds == RELU, a.relu(), torch.where(kinds == IDENTITY, a, 0))
        return linear(x, self.weights[-1], self.biases[-1])

    def count(self, kind: int) -> int:
        """Units of a kind."""
        return sum(int((kinds == kind).sum()) for kinds in self.kinds)

    @property
    def units(self) -> int:
        """Hidden units of all kinds."""
        return sum(len(kinds) for kinds in self.kinds)

    def compact(self) -> "SparseNet":
        """The same function without the units that are zero and the columns that read them."""
        weights, biases, kinds = list(self.weights), list(self.biases), list(self.kinds)
        for index, kind in enumerate(kinds):
            kept = kind != ZERO
            weights[index], biases[index] = weights[index][kept], biases[index][kept]
            weights[index + 1] = weights[index + 1][:, kept]
            kinds[index] = kind[kept]
        return SparseNet(tuple(weights), tuple(biases), tuple(kinds))

    def to(self, *where: Any) -> "SparseNet":
        """On another device, or with weights of another dtype; arguments as of ``Tensor.to``."""
        device = self.weights[0].to(*where).device
        return SparseNet(
            tuple(w.to(*where) for w in self.weights),
            tuple(b.to(*where) for b in self.biases),
            tuple(k.to(device) for k in self.kinds),
        )

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.count(kind)} {name}" for kind, name in enumerate(KINDS))
        shape = "-".join(str(w.shape[1]) for w in self.weights) + f"-{len(self.weights[-1])}"
        return f"SparseNet({shape}: {counts})"


def chain(model: nn.Module) -> tuple[list[nn.Linear], list[nn.ReLU]]:
    """The linear layers and the ReLUs between them, in order.

    Raises
    ------
    UnsupportedModel
        If the model holds anything but linear layers with ReLUs between them, each used once.
    """
    leaves = [m for m in model.modules() if not list(m.children())]
    linears = [m for m in leaves if isinstance(m, nn.Linear)]
    relus = [m for m in leaves if isinstance(m, nn.ReLU)]
    wanted = [nn.Linear if i % 2 == 0 else nn.ReLU for i in range(2 * len(linears) - 1)]
    alternate = len(leaves) == len(wanted) and all(
        isinstance(m, kind) for m, kind in zip(leaves, wanted, strict=True)
    )
    fits = alternate and all(a.out_features == b.in_features for a, b in pairwise(linears))
    if not fits or not relus or any(layer.bias is None for layer in linears):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a chain of Linear (with bias) and ReLU modules; sparse "
            "dynamics take a ReLU perceptron, such as nn.Sequential(Linear, ReLU, Linear)"
        )
    return linears, relus


def check_chain(model: nn.Module, x: Tensor) -> None:
    """Refuse a model that does not compute what its chain of layers does.

    Raises
    ------
    GossamerError
        If its input width is another, or its outputs differ.
    """
    linears, _ = chain(model)
    if x.shape[-1] != linears[0].in_features:
        raise GossamerError(
            f"the dynamics take {linears[0].in_features} inputs; states and actions of the data "
            f"have {x.shape[-1]} components together"
        )
    with torch.no_grad():
        own, net = model(x), SparseNet.dense(model)(x)
    if own.shape != net.shape or not torch.allclose(own, net, rtol=1e-4, atol=1e-5):
        raise UnsupportedModel(
            f"{type(model).__name__} does not run its layers one after the other; sparse dynamics "
            "take a plain ReLU perceptron"
        )
