"""Proximal operators: the step of a penalty, shared by pruning, codes and steering.

prox_{t f}(v) = argmin_x  t f(x) + ½ (x - v)², with t = ``step`` >= 0. All act elementwise on any
shape unless said otherwise, keep the sign, are the identity at t = 0, and return 0 where 0 and
another value are equally good.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

__all__ = ["PROX", "cel0", "group", "half", "hard", "nuclear", "soft"]


def _check(step: float) -> None:
    if step < 0:
        raise GossamerError(f"step of a proximal operator is {step!r}; it is at least 0")


def soft(v: Tensor, step: float) -> Tensor:
    """l1, f(x) = |x|: shrink towards 0 by ``step``."""
    _check(step)
    return v.sign() * (v.abs() - step).clamp_min(0)


def hard(v: Tensor, step: float) -> Tensor:
    """l0, f(x) = [x != 0]: keep what exceeds sqrt(2 step), unchanged."""
    _check(step)
    return torch.where(v.abs() > (2 * step) ** 0.5, v, 0.0)


def cel0(v: Tensor, step: float, norm: float = 0.5) -> Tensor:
    """CEL0, the continuous exact relaxation of l0, for an atom of norm ``norm``.

    With a = ``norm``, t = ``step`` and c = sqrt(2 t) / a, this is the minimiser over x of
    p(x) + ½ (x - v)² where::

        p(x) = t - (a²/2) (|x| - c)²   for |x| <= c
        p(x) = t                       for |x| > c

    p replaces the penalty t [x != 0]: it is 0 at 0, continuous, concave on each side, and a
    least-squares fit with it has the global minimisers of the fit with l0. For a < 1 the
    minimiser is sign(v) min(|v|, (|v| - sqrt(2 t) a)_+ / (1 - a²)). For a >= 1 the objective
    is concave between 0 and c, and the minimiser is that of l0, :func:`hard`.

    Parameters
    ----------
    norm : norm of the dictionary's atoms in the units of the gradient step (atom norm times
        the square root of the step length), above 0. Below 1 whenever that step is shorter
        than the inverse Lipschitz constant of the fit.

    Source: Soubies, Blanc-Féraud, Aubert 2015 (SIAM J. Imaging Sci. 8), the proximal operator
    of CEL0 with unit step.
    """
    _check(step)
    if not norm > 0:
        raise GossamerError(f"norm is {norm!r}; the norm of an atom is above 0")
    if norm >= 1:
        return hard(v, step)
    shrunk = (v.abs() - (2 * step) ** 0.5 * norm).clamp_min(0) / (1 - norm**2)
    return v.sign() * torch.minimum(v.abs(), shrunk)


def half(v: Tensor, step: float) -> Tensor:
    """l½, f(x) = sqrt|x|: zero up to (3/2) step^(2/3), else the cosine formula.

    Source: Xu et al. 2012, half thresholding, restated for ½ (x - v)².
    """
    _check(step)
    size = v.abs().double()
    cut = 1.5 * step ** (2 / 3)
    # With y = sqrt(x) the derivative vanishes where y³ - |v| y + step / 2 = 0; the largest root
    # of that cubic, in its trigonometric form. Beyond the cut the cosine is above -1 / sqrt(2).
    cosine = -(step / 4) * (3 / size.clamp_min(max(cut, 1e-30))) ** 1.5
    root = (4 / 3) * size * torch.cos(torch.acos(cosine) / 3).square()
    return torch.where(size > cut, v.sign() * root, 0.0).to(v.dtype)


def group(v: Tensor, step: float, dim: int = -1) -> Tensor:
    """Group l2, f(x) = ‖x‖₂ over ``dim``: shrink each group's norm by ``step``."""
    _check(step)
    size = v.square().sum(dim, keepdim=True).sqrt()
    return torch.where(size > step, v * (1 - step / size), 0.0)


def nuclear(v: Tensor, step: float) -> Tensor:
    """Nuclear norm of a matrix (..., R, C): soft threshold its singular values."""
    _check(step)
    left, values, right = torch.svd(v)
    return left * (values - step).clamp_min(0).unsqueeze(-2) @ right.mH


PROX: dict[str, Callable[[Tensor, float], Tensor]] = {
    "soft": soft,
    "hard": hard,
    "cel0": cel0,
    "half": half,
    "group": group,
    "nuclear": nuclear,
}
