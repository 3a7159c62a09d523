"""Compensate: prune a layer column by column, the columns still to come making up for each loss.

The squared error of a layer's outputs is tr(D H Dᵀ) with D = W - Ŵ and H the mean of 2 x xᵀ.
With H = R Rᵀ, R upper triangular, the error is ‖D R‖², and the best values of the columns from
a on, once those before are decided, are

    W'_b = W_b + (D_<a R_<a,b) R_bb⁻¹        for the block b that begins at a.

This is optimal brain surgeon's update of arXiv 2301.00774 (eq. 4 and algorithm 1, whose factor
U of H⁻¹ is R⁻¹), with every block reading the losses before it instead of each block writing to
all that follow. So H is never inverted: n³/3 operations instead of 4n³/3 for the factor.
Shapes: O = out features, I = in features, B = columns of a block. Tiles are stored (B, O), so
that a column of the weight is contiguous.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Factor", "compensate", "factorise"]

# Columns between two matrix products inside a block; among them, rank-1 updates.
_INNER = 16


@dataclass(frozen=True)
class Factor:
    """The triangular factor of a layer's damped Hessian.

    Parameters
    ----------
    upper : (I, I) float32, upper triangular, ``upper @ upper.T`` = H + damping.
    dead : (I,) bool, inputs that were zero on every token.
    warnings : how the factorisation departed from what was asked, if it did.
    """

    upper: Tensor
    dead: Tensor
    warnings: tuple[str, ...] = ()

    def inverse_diagonal(self) -> Tensor:
        """(I,), the diagonal of the inverse of the damped Hessian."""
        unit = torch.eye(len(self.upper), device=self.upper.device)
        return torch.linalg.solve_triangular(self.upper, unit, upper=True).square_().sum(0)


def factorise(hessian: Tensor, damping: float) -> Factor:
    """R with H + d I = R Rᵀ, the damping raised when H is not positive definite.

    Parameters
    ----------
    hessian : (I, I), symmetric; not changed.
    damping : d over the mean of H's diagonal (dead inputs left out), positive. Ten and a hundred
        times as much is tried when the factorisation fails; then the diagonal of H alone is
        taken, with which pruning is by |w| times the input norm and nothing is compensated.
        Either is told in ``warnings``.
    """
    diagonal = hessian.diagonal().float()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    for times in (1, 10, 100):
        # Both axes reversed, so that the lower factor, reversed again, is the upper one.
        damped = hessian.float().flip(0, 1)
        damped.diagonal().add_(mean * (damping * times))
        # A dead input has no cross terms: any positive entry leaves the others as they are.
        damped.diagonal()[dead.flip(0)] = torch.where(mean > 0, mean, 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            raised = f"Hessian not positive definite at damping {damping:g}; {damping * times:g}"
            told = () if times == 1 else (f"{raised} was used",)
            return Factor(lower.flip(0, 1), dead, told)
    told = (
        f"Hessian not positive definite even at damping {damping * 100:g}; pruned by |w| times "
        "the input norm, without compensation"
    )
    scale = diagonal.clamp_min(0).sqrt()
    return Factor(torch.diag(torch.where(scale > 0, scale, 1.0)), dead, (told,))


def compensate(
    weight: Tensor,
    factor: Factor,
    block: int,
    together: int,
    choose: Callable[[int, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Prune a layer and update what is left.

    Entries that are zero to begin with stay zero whatever ``choose`` says, and nothing is
    expected of them.

    Parameters
    ----------
    weight : (O, I), not changed.
    block : columns whose updates are collected, a multiple of ``together`` or equal to it.
    together : columns decided at once, from their values at that moment.
    choose : of the first of these columns and their scores (columns, O), higher means keep, to
        the mask (columns, O) of what stays. Scores of zeros and of dead inputs are 0.

    Returns
    -------
    mask (O, I) bool and new weight (O, I) float32.
    """
    rows, columns = weight.shape
    # Filled with D, block by block; at the end with the new weight, to need no third matrix.
    out = torch.empty(columns, rows, device=weight.device)
    mask = torch.empty(columns, rows, dtype=torch.bool, device=weight.device)
    for start in range(0, columns, block):
        part = slice(start, min(start + block, columns))
        dense = weight[:, part].T.float().contiguous()
        corner = factor.upper[part, part]
        unit = torch.eye(len(corner), device=corner.device)
        inverse = torch.linalg.solve_triangular(corner, unit, upper=True)
        tile = dense.clone()
        if start:
            tile.addmm_(inverse.T, factor.upper[:start, part].T @ out[:start])
        live = dense != 0
        scale = corner.diagonal()[:, None]

        def decide(
            at: int,
            values: Tensor,
            start: int = start,
            live: Tensor = live,
            scale: Tensor = scale,
        ) -> Tensor:
            own = slice(at, at + len(values))
            # The square root of w² / U_jj², the same order without underflow.
            score = values.abs().mul_(scale[own]).mul_(live[own])
            score[factor.dead[start + at : start + at + len(values)]] = 0
            mask[start + at : start + at + len(values)] = kept = choose(start + at, score)
            return kept & live[own]

        _walk(tile, inverse, together, decide)
        torch.sub(dense, tile, out=out[part])
    out.neg_().add_(weight.T)
    return mask.T.contiguous(), out.T


def _walk(
    tile: Tensor, inverse: Tensor, together: int, decide: Callable[[int, Tensor], Tensor]
) -> None:
    """Go through a block's columns in order: decide, drop, let the later ones compensate.

    Parameters
    ----------
    tile : (B, O), the block's values with all earlier blocks compensated; becomes the result.
    inverse : (B, B) upper triangular, the inverse of the factor's diagonal block.
    decide : of a position in the tile and the current values there to what stays.
    """
    width = len(tile)
    inner = _INNER if together >= width else max(together, _INNER // together * together)
    stays = torch.empty_like(tile, dtype=torch.bool)
    errors = torch.empty_like(tile)
    pull = torch.empty_like(tile)  # 1 / U_jj where a weight is dropped, 0 where it stays
    rates = inverse.diagonal().reciprocal()[:, None]
    for begin in range(0, width, inner):
        end = min(begin + inner, width)
        for j in range(begin, end):
            if j % together == 0:
                new = slice(j, min(j + together, width))
                stays[new] = decide(j, tile[new])
                torch.mul(~stays[new], rates[new], out=pull[new])
            torch.mul(tile[j], pull[j], out=errors[j])
            if j + 1 < end:
                tile[j + 1 : end].addr_(inverse[j, j + 1 : end], errors[j], alpha=-1)
        if end < width:
            tile[end:].addmm_(inverse[begin:end, end:].T, errors[begin:end], alpha=-1)
    tile.mul_(stays)
