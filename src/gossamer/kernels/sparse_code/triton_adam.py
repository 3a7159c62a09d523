"""One pass of Adam over a matrix, row by row, in Triton.

Reads gradient, master and both moments once, writes master, moments and the copy that computes.
Where rows are atoms of norm 1, the gradient's part along the atom is taken out before, and the
norm restored after, in the same pass.
Shapes: M = rows, D = columns; one program holds a row.
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl

__all__ = ["adam_rows_kernel", "square_rows_kernel"]


@triton.jit
def square_rows_kernel(
    grad,  # (M, D)
    master,  # float32 (M, D)
    out,  # float32 (M,)
    D,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Squared norm of each row's gradient, its part along the atom left out where UNIT."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    inside = column < D
    g = tl.load(grad + row * D + column, mask=inside, other=0.0).to(tl.float32)
    if UNIT:
        w = tl.load(master + row * D + column, mask=inside, other=0.0)
        g -= tl.sum(g * w, axis=0) * w
    tl.store(out + row, tl.sum(g * g, axis=0))


@triton.jit
def adam_rows_kernel(
    grad,  # (M, D)
    master,  # float32 (M, D)
    mean,  # float32 (M, D)
    square,  # float32 (M, D)
    param,  # (M, D): the copy that computes
    clip,  # float32 (1,): the gradient is multiplied by it
    rate,
    beta1,
    beta2,
    bias2,  # sqrt(1 - beta2^t)
    eps,
    D,
    UNIT: tl.constexpr,
    COPY: tl.constexpr,
    WIDE: tl.constexpr,
):
    """master -= rate mean / (sqrt(square) / bias2 + eps); rate holds the other correction."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    inside = column < D
    at = row * D + column
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(master + at, mask=inside, other=0.0)
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(square + at, mask=inside, other=0.0)
    if UNIT:
        g -= tl.sum(g * w, axis=0) * w
    g *= tl.load(clip)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    w -= rate * m / (tl.sqrt(v) / bias2 + eps)
    if UNIT:
        w /= tl.sqrt(tl.sum(w * w, axis=0))
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(master + at, w, mask=inside)
    if COPY:
        tl.store(param + at, w.to(param.dtype.element_ty), mask=inside)
