"""SparseCoder: codes that minimise error plus a penalty, found by proximal gradient steps.

Unlike an autoencoder it has no encoder: every code is the answer to its own small problem.
Shapes: N = patches, D = pixels, M = atoms.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, check_count, prox, unknown

__all__ = ["PENALTIES", "Penalty", "SparseCoder"]

Penalty = Literal["soft", "hard", "cel0", "half", "group"]
PENALTIES: tuple[Penalty, ...] = get_args(Penalty)
_CONVEX = ("soft", "group")
# Below the inverse Lipschitz constant, so that CEL0's proximal step is a continuous one.
_SHARE = 0.9
_START = 0.5


class SparseCoder(nn.Module):
    """min_c ½‖x - c A‖² + λ φ(c) for atoms A (M, D) of norm 1.

    Parameters
    ----------
    pixels : D. atoms : M.
    penalty : φ, by the name of its proximal operator in :data:`gossamer.core.prox.PROX`: ``soft``
        |c|, ``hard`` [c != 0], ``cel0`` its continuous relaxation, ``half`` sqrt|c|, ``group``
        the norm of ``group_size`` neighbouring coefficients.
    weight : λ, >= 0, for pixels of variance 1.
    steps : proximal steps of a code. group_size : divides M; only ``group`` reads it.
    seed : of the first atoms, random directions.

    Attributes
    ----------
    atoms : (M, D), norm 1.
    """

    def __init__(
        self,
        pixels: int,
        atoms: int,
        *,
        penalty: Penalty = "soft",
        weight: float = 0.5,
        steps: int = 50,
        group_size: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count("pixels", pixels, 1)
        check_count("atoms", atoms, 1)
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(atoms, pixels, generator=generator)
        self.atoms = nn.Parameter(nn.functional.normalize(first, dim=1), requires_grad=False)
        self.configure(penalty, weight, steps, group_size)

    def configure(self, penalty: Penalty, weight: float, steps: int, group_size: int = 4) -> None:
        """Choose how codes are found."""
        if penalty not in PENALTIES:
            raise unknown("penalty", penalty, PENALTIES)
        if not 0 <= weight < float("inf"):
            raise GossamerError(f"weight is {weight!r}; give a number, at least 0")
        check_count("steps", steps, 1)
        check_count("group_size", group_size, 1)
        if penalty == "group" and len(self.atoms) % group_size:
            raise GossamerError(f"group_size is {group_size}; it divides {len(self.atoms)} atoms")
        self.penalty: Penalty = penalty
        self.weight, self.steps = weight, steps
        self.group_size = group_size

    def shrink(self, moved: Tensor, length: float) -> Tensor:
        """The proximal operator of ``length`` λ φ at (N, M)."""
        step = length * self.weight
        if self.penalty == "cel0":
            return prox.cel0(moved, step, norm=length**0.5)
        if self.penalty == "group":
            return prox.group(moved.unflatten(1, (-1, self.group_size)), step).flatten(1)
        return prox.PROX[self.penalty](moved, step)

    def step_length(self) -> float:
        """0.9 of the inverse of the largest eigenvalue of A Aᵀ."""
        return _SHARE / float(torch.linalg.matrix_norm(self.atoms.detach(), 2)) ** 2

    @torch.no_grad()
    def codes(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Codes (N, M) of patches (N, D).

        Convex penalties are accelerated (FISTA). The others have many local minima, of which
        steps from zero find a poor one; they start at the code of ``soft`` with the λ that keeps
        the same smallest coefficient, in half as many steps.

        Parameters
        ----------
        start : (N, M), where to start instead.

        Raises
        ------
        GossamerError
            If the width is not D or a value is not finite.
        """
        if x.dim() != 2 or x.shape[1] != self.atoms.shape[1]:
            raise GossamerError(
                f"patches have shape {tuple(x.shape)}; this coder reads (N, {self.atoms.shape[1]})"
            )
        if not bool(torch.isfinite(x).all()):
            raise GossamerError("patches hold NaN or infinity; leave those out")
        problem = _Problem(x @ self.atoms.T, self.atoms @ self.atoms.T, self.step_length())
        if self.penalty in _CONVEX:
            return problem.descend(self.shrink, self.steps, start, fast=True)
        if start is None:
            # The least that an atom explains to pay for itself: what lambda takes off under soft.
            level = (2 * self.weight) ** 0.5 if self.penalty != "half" else self.weight ** (2 / 3)

            def soft(moved: Tensor, length: float) -> Tensor:
                return prox.soft(moved, _START * length * level)

            start = problem.descend(soft, -(-self.steps // 2), None, fast=True)
        return problem.descend(self.shrink, self.steps, start, fast=False)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction (N, D) of patches."""
        return self.codes(x) @ self.atoms


class _Problem(NamedTuple):
    """Least squares seen from the codes.

    Parameters
    ----------
    drive : (N, M), x Aᵀ. gram : (M, M), A Aᵀ. length : of a step.
    """

    drive: Tensor
    gram: Tensor
    length: float

    def descend(
        self,
        shrink: Callable[[Tensor, float], Tensor],
        steps: int,
        start: Tensor | None,
        *,
        fast: bool,
    ) -> Tensor:
        """Codes after proximal gradient steps; ``fast`` with Nesterov's momentum (FISTA)."""
        code = torch.zeros_like(self.drive) if start is None else start
        ahead, momentum = code, 1.0
        for _ in range(steps):
            downhill = torch.addmm(self.drive, ahead, self.gram, alpha=-1)
            new = shrink(ahead + self.length * downhill, self.length)
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = new + (momentum - 1) / following * (new - code) if fast else new
            code, momentum = new, following
        return code
