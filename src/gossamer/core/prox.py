"""Proximal operators: the step of a penalty, shared by pruning, codes and steering.

prox_{t f}(v) = argmin_x  t f(x) + ½ (x - v)². All act elementwise on any shape unless said
otherwise, keep the sign, and are the identity at t = 0.
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
    """CEL0, the continuous exact relaxation of l0, for atoms of norm ``norm``.

    f(x) = 1 - (a²/2)(|x| - sqrt(2)/a)² where |x| <= sqrt(2)/a and 1 beyond, a = ``norm`` / sqrt(step)
    after scaling by the step. For a² step-scaled below 1 the operator is
    sign(v) min(|v|, (|v| - sqrt(2 step) a)_+ / (1 - a²)) with a = ``norm``.

    Parameters
    ----------
    norm : norm of the dictionary's atoms, 0 < norm < 1 (scale the data by the Lipschitz constant).

    Source: Soubies, Blanc-Féraud, Aubert 2015, eq. 4.5.
    """
    _check(step)
    if not 0 < norm < 1:
        raise GossamerError(f"norm is {norm!r}; CEL0's operator needs 0 < norm < 1")
    shrunk = (v.abs() - (2 * step) ** 0.5 * norm).clamp_min(0) / (1 - norm**2)
    return v.sign() * torch.minimum(v.abs(), shrunk)


def half(v: Tensor, step: float) -> Tensor:
    """l½, f(x) = sqrt|x|: zero below (3/2) step^(2/3), else the cosine formula.

    Source: Xu et al. 2012, half thresholding, restated for ½ (x - v)².
    """
    _check(step)
    size = v.abs().double()
    cut = 1.5 * step ** (2 / 3)
    # Stationary point of step sqrt(x) + (x - v)²/2, the largest root of x^{3/2} - v x^{1/2} + step/2.
    angle = torch.acos((-(step / 4) * (3 / size.clamp_min(1e-300)) ** 1.5).clamp(-1, 1))
    root = (4 / 3) * size * torch.cos(angle / 3).square()
    return torch.where(size > cut, v.sign().double() * root, 0.0).to(v.dtype)


def group(v: Tensor, step: float, dim: int = -1) -> Tensor:
    """Group l2, f(x) = ‖x‖₂ over ``dim``: shrink each group's norm by ``step``."""
    _check(step)
    size = torch.linalg.vector_norm(v, dim=dim, keepdim=True)
    return v * (1 - step / size.clamp_min(1e-30)).clamp_min(0)


def nuclear(v: Tensor, step: float) -> Tensor:
    """Nuclear norm of a matrix (..., R, C): soft threshold its singular values."""
    _check(step)
    left, values, right = torch.linalg.svd(v, full_matrices=False)
    return left * (values - step).clamp_min(0).unsqueeze(-2) @ right


PROX: dict[str, Callable[[Tensor, float], Tensor]] = {
    "soft": soft,
    "hard": hard,
    "cel0": cel0,
    "half": half,
    "group": group,
    "nuclear": nuclear,
}
