"""Bases of activations: by variance (PCA), and by what the next layer makes of it (LIB).

Activations are centred; the constant is a direction of its own that no basis touches.
Shapes: R = rows, D = width of a layer, D' = width of the next, K = directions, K' = of the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import GossamerError

__all__ = [
    "Basis",
    "edges",
    "edges_needed",
    "interaction_basis",
    "jacobians",
    "listening",
    "pca_basis",
]

SMALLEST = 1e-12
"""Directions below this share of the strongest are left out: they are rounding."""

_CHUNK = 1024


@dataclass(frozen=True)
class Basis:
    """Features of a layer: f̂ = (f - mean) @ into, and back f ≈ mean + f̂ @ back.

    Parameters
    ----------
    mean : float64 (D,). into : float64 (D, K). back : float64 (K, D), its pseudo-inverse.
    strength : float64 (K,), falling: variance (PCA), or importance to the next layer (LIB).
    """

    mean: Tensor
    into: Tensor
    back: Tensor
    strength: Tensor

    def scaled(self) -> "Basis":
        """The same directions in units in which every feature has variance 1, for PCA's."""
        size = self.strength.sqrt()
        return Basis(self.mean, self.into / size, self.back * size[:, None], self.strength)

    def features(self, rows: Tensor) -> Tensor:
        """(..., D) to (..., K), float64."""
        return (rows.double() - self.mean) @ self.into

    def rebuild(self, rows: Tensor, keep: int | None = None) -> Tensor:
        """(..., D) to (..., D): what the first ``keep`` features say, in the rows' dtype."""
        kept = slice(0, keep)
        return (self.features(rows)[..., kept] @ self.back[kept] + self.mean).to(rows.dtype)


def pca_basis(rows: Tensor, smallest: float = SMALLEST) -> Basis:
    """Principal directions of (R, D) rows, by falling variance; the last layer's basis.

    Parameters
    ----------
    smallest : directions below this share of the strongest variance are left out.

    Raises
    ------
    GossamerError
        If the rows do not vary.
    """
    mean, turn, variance = _principal(rows, smallest)
    return Basis(mean, turn, turn.T.contiguous(), variance)


def _principal(rows: Tensor, smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), principal directions (D, K) and their variances (K,), float64, falling."""
    rows = rows.double()
    mean = rows.mean(0)
    gram = (rows - mean).T @ (rows - mean) / len(rows)
    variance, turn = torch.linalg.eigh(gram)
    variance, turn = variance.flip(0), turn.flip(1)
    if not float(variance[0]) > 0:
        raise GossamerError(f"{len(rows)} rows of activations do not vary; give other data")
    kept = variance > smallest * variance[0]
    return mean, turn[:, kept], variance[kept]


def interaction_basis(rows: Tensor, listening: Tensor, smallest: float = SMALLEST) -> Basis:
    """The local interaction basis of a layer.

    With the Gram matrix G = U D Uᵀ of the activations and M' the mean of JᵀJ, J the Jacobian of
    the next layer's features by them: D^½ Uᵀ M' U D^½ = V Λ Vᵀ, and C = U D^-½ V Λ^½. A
    direction's Λ is what a typical change along it does to the next layer's features.

    Parameters
    ----------
    rows : (R, D) activations. listening : (D, D), M'.
    smallest : directions below this share of the strongest variance, then of the strongest Λ,
        are left out.

    Raises
    ------
    GossamerError
        If the rows do not vary, or the next layer does not listen to them.
    """
    mean, turn, variance = _principal(rows, smallest)
    root = variance.sqrt()
    heard = root[:, None] * (turn.T @ listening.double() @ turn) * root
    strength, rotate = torch.linalg.eigh((heard + heard.T) / 2)
    strength, rotate = strength.flip(0), rotate.flip(1)
    if not float(strength[0]) > 0:
        raise GossamerError("the next layer does not depend on these activations; name others")
    kept = strength > smallest * strength[0]
    strength, rotate = strength[kept], rotate[:, kept]
    size = strength.sqrt()
    into = (turn / root) @ rotate * size
    back = (rotate / size).T @ (turn * root).T
    return Basis(mean, into, back, strength)


def jacobians(layer: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """(R, D', D), of a layer that maps each row (R, D) by itself; one output at a time."""
    found = []
    for part in rows.split(_CHUNK):
        given = part.detach().requires_grad_()
        with torch.enable_grad():
            out = layer(given)
            grads = [
                torch.autograd.grad(out[:, i].sum(), given, retain_graph=True)[0]
                for i in range(out.shape[1])
            ]
        found.append(torch.stack(grads, 1))
    return torch.cat(found)


def listening(jacobian: Tensor, after: Basis) -> Tensor:
    """M' (D, D) of a layer whose Jacobians (R, D', D) are known: the mean of JᵀJ in features."""
    heard = torch.einsum("ek,red->rkd", after.into, jacobian.double())
    return torch.einsum("rkd,rkc->dc", heard, heard) / len(heard)


def edges(jacobian: Tensor, basis: Basis, after: Basis) -> Tensor:
    """Mean squared interaction of features of two layers: (K', K), E (∂f̂'_i / ∂f̂_j)².

    Parameters
    ----------
    jacobian : (R, D', D). basis, after : of the layer and the next.
    """
    moved = torch.einsum("ek,red,jd->rkj", after.into, jacobian.double(), basis.back)
    return moved.square().mean(0)


def edges_needed(weights: Tensor | Sequence[Tensor], share: float = 0.95) -> int:
    """The fewest edges whose weights sum to a share of all."""
    parts = [weights] if isinstance(weights, Tensor) else list(weights)
    flat = torch.cat([part.flatten() for part in parts]).sort(descending=True).values
    summed = flat.cumsum(0)
    return int((summed < share * summed[-1]).sum()) + 1
