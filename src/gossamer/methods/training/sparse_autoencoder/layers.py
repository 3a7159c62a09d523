"""Two forms of one sparse layer: stored connections only, or a dense matrix under a mask.

Both do the same arithmetic and draw the same random numbers. The stored form is what trains; the
masked one is what it is measured against, and its reference in tests.
Shapes: O = outputs, I = inputs, B = batch, K = connections. Activations have one feature a row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from gossamer.kernels.sparse_training import (
    Connections,
    connection_gradient,
    sparse_product,
    transposed_product,
)
from gossamer.methods.training.sparse_autoencoder.rewiring import (
    free_places,
    random_places,
    survivors,
)

__all__ = ["Descent", "Layer", "MaskedLayer", "StoredLayer", "initial"]

_SCALE = 0.1  # standard deviation of new weights


@dataclass(frozen=True)
class Descent:
    """Stochastic gradient descent with momentum: v = m v - lr g, then w = (1 - decay) w + v.

    Parameters
    ----------
    lr, momentum, decay : decay is taken off the weights themselves, not scaled by lr.
    """

    lr: float = 0.01
    momentum: float = 0.9
    decay: float = 1e-5

    def step(self, weight: Tensor, velocity: Tensor, gradient: Tensor) -> None:
        """Update weight and velocity in place."""
        velocity.mul_(self.momentum).add_(gradient, alpha=-self.lr)
        weight.mul_(1.0 - self.decay).add_(velocity)


class Layer(Protocol):
    """What training asks of a layer."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias: (I, B) to (O, B)."""
        ...

    def backward(self, delta: Tensor) -> Tensor:
        """W^T delta: (O, B) to (I, B)."""
        ...

    def update(self, delta: Tensor, x: Tensor, descent: Descent) -> None:
        """One step down the gradient of the batch's mean."""
        ...

    def rewire(self, zeta: float, generator: Generator) -> None:
        """Replace the share ``zeta`` of the connections."""
        ...

    def connections(self) -> Connections:
        """The matrix as it is now."""
        ...


def initial(
    shape: tuple[int, int], count: int, generator: Generator, dtype: torch.dtype = torch.float32
) -> Connections:
    """An Erdos-Renyi matrix of ``count`` connections with weights from N(0, 0.1^2)."""
    places = random_places(count, shape, generator)
    return Connections.at(_SCALE * _normal(count, generator, dtype), places, shape)


def _normal(count: int, generator: Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, generator=generator).to(dtype)


def _exchange(
    values: Tensor, places: Tensor, size: int, zeta: float, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Which connections stay, and places and weights of as many new ones as go."""
    keep = survivors(values, zeta)
    count = int((~keep).sum())
    added = free_places(places[keep], count, size, generator)
    return keep, added, _SCALE * _normal(count, generator, values.dtype)


class StoredLayer:
    """A layer that holds, moves and updates only the connections that exist.

    Attributes
    ----------
    matrix : (O, I). velocity : (K,). bias, bias_velocity : (O,).
    """

    def __init__(self, matrix: Connections) -> None:
        self.matrix = matrix
        self.velocity = torch.zeros_like(matrix.values)
        self.bias = matrix.values.new_zeros(matrix.shape[0])
        self.bias_velocity = torch.zeros_like(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias."""
        return sparse_product(self.matrix, x).add_(self.bias[:, None])

    def backward(self, delta: Tensor) -> Tensor:
        """W^T delta."""
        return transposed_product(self.matrix, delta)

    def update(self, delta: Tensor, x: Tensor, descent: Descent) -> None:
        """One step; the gradient exists only where there are connections."""
        gradient = connection_gradient(self.matrix, delta, x).div_(x.shape[1])
        descent.step(self.matrix.values, self.velocity, gradient)
        descent.step(self.bias, self.bias_velocity, delta.mean(1))

    def rewire(self, zeta: float, generator: Generator) -> None:
        """Replace connections; new ones start without momentum."""
        old, (rows, columns) = self.matrix, self.matrix.shape
        places = old.places()
        keep, added, fresh = _exchange(old.values, places, rows * columns, zeta, generator)
        # Both lists ascend, so a new connection's place in the merged one is known at once.
        stays = torch.ones(len(places), dtype=torch.bool)
        at = torch.searchsorted(kept := places[keep], added) + torch.arange(len(added))
        stays[at] = False
        places[at], places[stays] = added, kept
        values, velocity = torch.empty_like(old.values), torch.zeros_like(self.velocity)
        values[at], values[stays] = fresh, old.values[keep]
        velocity[stays] = self.velocity[keep]
        self.velocity = velocity
        self.matrix = Connections.at(values, places, old.shape)

    def connections(self) -> Connections:
        """The matrix itself."""
        return self.matrix


class MaskedLayer:
    """The same layer as a dense matrix under a mask: dense products, then zeros put back.

    Attributes
    ----------
    weight, mask, velocity : (O, I). bias, bias_velocity : (O,).
    """

    def __init__(self, matrix: Connections) -> None:
        self.weight = matrix.dense()
        self.mask = torch.zeros(self.weight.shape, dtype=torch.bool)
        self.mask.view(-1)[matrix.places()] = True
        self.velocity = torch.zeros_like(self.weight)
        self._gradient = torch.empty_like(self.weight)
        self.bias = matrix.values.new_zeros(matrix.shape[0])
        self.bias_velocity = torch.zeros_like(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias."""
        return torch.mm(self.weight, x).add_(self.bias[:, None])

    def backward(self, delta: Tensor) -> Tensor:
        """W^T delta."""
        return torch.mm(self.weight.t(), delta)

    def update(self, delta: Tensor, x: Tensor, descent: Descent) -> None:
        """One step with a dense gradient, of which the mask leaves the connections."""
        torch.mm(delta, x.t(), out=self._gradient)
        self._gradient.div_(x.shape[1]).mul_(self.mask)
        descent.step(self.weight, self.velocity, self._gradient)
        descent.step(self.bias, self.bias_velocity, delta.mean(1))

    def rewire(self, zeta: float, generator: Generator) -> None:
        """Replace connections; new ones start without momentum."""
        weight, velocity, mask = (t.view(-1) for t in (self.weight, self.velocity, self.mask))
        places = mask.nonzero()[:, 0]
        keep, added, fresh = _exchange(weight[places], places, len(weight), zeta, generator)
        gone = places[~keep]
        for tensor in (weight, velocity, mask):
            tensor[gone] = 0
        weight[added] = fresh
        velocity[added] = 0
        mask[added] = True

    def connections(self) -> Connections:
        """The entries under the mask."""
        places = self.mask.view(-1).nonzero()[:, 0]
        rows, columns = self.weight.shape
        return Connections.at(self.weight.view(-1)[places], places, (rows, columns))
