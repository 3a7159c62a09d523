"""y = (M ∘ (W + β U V)) x without a second copy of W: what backward needs is computed again.

Autograd by itself would keep W + β U V, its mask's product and the scores of every layer until the
backward pass. Here a layer keeps its input and its small parameters; dense temporaries live for
one layer at a time.
Shapes: O and I sides of the matrix, r ranks, N positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["Scales", "Scores", "masked_linear", "scores", "updated"]


@dataclass(frozen=True)
class Scales:
    """Factors of the parts: ``beta`` of U V, ``alpha1`` of A B, ``alpha2`` of rows and columns."""

    beta: float = 1.0
    alpha1: float = 1.0
    alpha2: float = 1.0


@dataclass(frozen=True)
class Scores:
    """What is added to |W + β U V| for the score; None where a part is left out.

    Parameters
    ----------
    a, b : (O, r), (r, I). row, column : (O,), (I,).
    """

    a: Tensor | None = None
    b: Tensor | None = None
    row: Tensor | None = None
    column: Tensor | None = None


def updated(weight: Tensor, u: Tensor, v: Tensor, beta: float) -> Tensor:
    """W + β U V in float32 or wider, a new (O, I) tensor."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.to(kind), u.to(kind), v.to(kind), alpha=beta)


def scores(weight: Tensor, u: Tensor, v: Tensor, parts: Scores, scales: Scales) -> Tensor:
    """S = |W + β U V| + α₁ A B + α₂ (R 1ᵀ + 1 Cᵀ), (O, I) float32; higher means keep."""
    score = updated(weight, u, v, scales.beta).abs_()
    if parts.a is not None and parts.b is not None:
        score.addmm_(parts.a.to(score), parts.b.to(score), alpha=scales.alpha1)
    if parts.row is not None and parts.column is not None:
        score.add_(parts.row.to(score)[:, None], alpha=scales.alpha2)
        score.add_(parts.column.to(score), alpha=scales.alpha2)
    return score


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    u: Tensor,
    v: Tensor,
    parts: Scores,
    scales: Scales,
) -> Tensor:
    """(M ∘ (W + β U V)) x + bias, with straight-through gradients for the scores.

    With G the gradient of the masked matrix and W' = W + β U V, the scores get G ∘ W' everywhere
    (∂M/∂S = 1), so that W' gets (M + |W'|) ∘ G: through the product, and through |W'| in its own
    score. W and bias get none.

    Parameters
    ----------
    x : (..., I). weight : (O, I), any floating dtype. mask : bool (O, I).
    """
    return _MaskedLinear.apply(
        x, weight, bias, mask, u, v, parts.a, parts.b, parts.row, parts.column, scales
    )


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        u: Tensor,
        v: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        row: Tensor | None,
        column: Tensor | None,
        scales: Scales,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask, u, v, a, b, row, column)
        ctx.scales = scales
        return linear(x, updated(weight, u, v, scales.beta).mul_(mask).to(weight.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mask, u, v, a, b, row, column = ctx.saved_tensors
        scales: Scales = ctx.scales
        with torch.autocast(x.device.type, enabled=False):
            whole = updated(weight, u, v, scales.beta)
            to_x = None
            if ctx.needs_input_grad[0]:
                seen = (whole * mask).to(gradient.dtype)
                to_x = (gradient @ seen).to(x.dtype)
            flat = gradient.reshape(-1, gradient.shape[-1])
            dense = (flat.T @ x.reshape(-1, x.shape[-1]).to(flat.dtype)).to(whole.dtype)
            to_score = dense * whole
            dense.mul_(whole.abs_().add_(mask))
            to_u = scales.beta * (dense @ v.to(dense).T)
            to_v = scales.beta * u.to(dense).T @ dense
            to_a = to_b = to_row = to_column = None
            if a is not None and b is not None:
                to_a = scales.alpha1 * (to_score @ b.to(dense).T)
                to_b = scales.alpha1 * a.to(dense).T @ to_score
            if row is not None and column is not None:
                to_row = scales.alpha2 * to_score.sum(1)
                to_column = scales.alpha2 * to_score.sum(0)
        given = (u, v, a, b, row, column)
        made = (to_u, to_v, to_a, to_b, to_row, to_column)
        back = (g if g is None else g.to(p) for p, g in zip(given, made, strict=True))
        return to_x, None, None, None, *back, None
