"""Logistic regressions, many at once: every fold and every strength in one batch.

Held-out rows get the weight 0, so that all folds share one matrix. With s_i the weight of row i,
y_i in {-1, 1} and C the strength, a fit minimises over w and an unpenalised b::

    penalty(w) + C sum_i s_i log(1 + exp(-y_i (x_i w + b)))

Shapes: P = problems, N = rows, D = columns. All arithmetic is float64.
"""

import torch
from torch import Tensor, nn

__all__ = ["STRENGTHS", "lasso", "reduced", "ridge"]

STRENGTHS = tuple(float(c) for c in torch.logspace(5, -5, 10, dtype=torch.float64))
_TINY = 1e-10


def _objective(margin: Tensor, penalty: Tensor, weights: Tensor, strength: Tensor) -> Tensor:
    """(..., P) values of the objective for margins (..., P, N)."""
    return penalty + strength * (weights * nn.functional.softplus(-margin)).sum(-1)


def ridge(
    x: Tensor, y: Tensor, weights: Tensor, strength: Tensor, *, iterations: int = 50
) -> Tensor:
    """Minimisers under the penalty ½ ‖w‖², by Newton steps that are halved until they descend.

    Parameters
    ----------
    x : (N, D). y : (N,) of -1 and 1. weights : (P, N), at least 0. strength : (P,), C above 0.

    Returns
    -------
    (P, D + 1): w, then b.
    """
    rows = torch.cat([x, x.new_ones(len(x), 1)], 1)
    found = x.new_zeros(len(weights), rows.shape[1])
    steps = 0.5 ** torch.arange(12, dtype=x.dtype)
    for _ in range(iterations):
        margin = (found @ rows.T) * y
        miss = torch.sigmoid(-margin) * weights * strength[:, None]
        penalised = found.clone()
        penalised[:, -1] = 0
        slope = penalised - (miss * y) @ rows
        curve = miss * torch.sigmoid(margin)
        hessian = torch.einsum("pn,nd,ne->pde", curve, rows, rows)
        hessian.diagonal(dim1=1, dim2=2)[:, :-1] += 1
        # The intercept has no penalty: where all rows are sure, its curvature vanishes.
        hessian[:, -1, -1] += _TINY + 1e-9 * hessian[:, -1, -1]
        move = -torch.linalg.solve(hessian, slope[:, :, None])[:, :, 0]
        fall = (slope * move).sum(1)
        moved = (move @ rows.T) * y
        now = _objective(margin, found[:, :-1].square().sum(1) / 2, weights, strength)
        tried = found[:, :-1] + steps[:, None, None] * move[:, :-1]
        values = _objective(
            margin + steps[:, None, None] * moved, tried.square().sum(2) / 2, weights, strength
        )
        good = values <= now + 1e-4 * steps[:, None] * fall
        first = good.int().argmax(0)
        found = found + torch.where(good.any(0), steps[first], 0.0)[:, None] * move
        # This step was Newton's too, so the gap that is left is far smaller still.
        if float(-fall.min()) < 1e-5:
            break
    return found


def lasso(
    x: Tensor, y: Tensor, weights: Tensor, strength: Tensor, *, iterations: int = 300
) -> Tensor:
    """Minimisers under the penalty ‖w‖₁, by accelerated proximal steps (FISTA with restarts).

    Very weak penalties on separable rows have far minimisers; there the limit of iterations acts
    as a further regulariser. Parameters and result are those of :func:`ridge`.
    """
    rows = torch.cat([x, x.new_ones(len(x), 1)], 1)
    reach = torch.linalg.eigvalsh(torch.einsum("pn,nd,ne->pde", weights, rows, rows))[:, -1]
    step = 4 / reach.clamp_min(_TINY)
    shrink = (step / strength)[:, None]
    found = ahead = x.new_zeros(len(weights), rows.shape[1])
    pace = x.new_ones(len(weights))
    for _ in range(iterations):
        miss = torch.sigmoid(-(ahead @ rows.T) * y) * weights * y
        moved = ahead + step[:, None] * (miss @ rows)
        slim = moved[:, :-1].sign() * (moved[:, :-1].abs() - shrink).clamp_min(0)
        new = torch.cat([slim, moved[:, -1:]], 1)
        # Momentum that points uphill starts again from rest.
        uphill = ((ahead - new) * (new - found)).sum(1) > 0
        after = torch.where(uphill, 1.0, (1 + (1 + 4 * pace.square()).sqrt()) / 2)
        push = torch.where(uphill, 0.0, (pace - 1) / after)
        change = float((new - found).abs().max())
        ahead, found, pace = new + push[:, None] * (new - found), new, after
        if change < 1e-7:
            break
    return found


def reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) as (N, R) in the directions the rows span, and those directions (D, R).

    Fits under ½ ‖w‖² have no part outside them, so none is lost and R is at most N.
    """
    left, size, right = torch.linalg.svd(x, full_matrices=False)
    rank = int((size > size[:1] * 1e-12).sum())
    return left[:, :rank] * size[:rank], right[:rank].T
