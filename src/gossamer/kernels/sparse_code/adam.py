"""Adam of a dictionary's matrices in one pass each, with atoms kept at norm 1.

Source: Kingma & Ba 2015, in torch's order of operations.
Shapes: M = rows, D = columns.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from math import sqrt

import torch
from torch import Tensor

from gossamer.kernels.sparse_code.op import usable

__all__ = ["adam_rows", "fits", "square_rows"]

_WIDEST = 1 << 14


def fits(matrix: Tensor) -> bool:
    """Whether the kernel takes a contiguous (M, D) matrix: on its device, a row in one program."""
    return usable(matrix.device) and matrix.dim() == 2 and matrix.shape[1] <= _WIDEST


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8


def square_rows(grad: Tensor, master: Tensor, *, unit: bool) -> Tensor:
    """(M,) squared norms of a gradient's rows, without their part along a row of norm 1."""
    import triton

    from gossamer.kernels.sparse_code.launch import on
    from gossamer.kernels.sparse_code.triton_adam import square_rows_kernel

    M, D = master.shape
    out = torch.empty(M, dtype=torch.float32, device=master.device)
    with on(master):
        square_rows_kernel[(M,)](
            grad,
            master,
            out,
            D,
            UNIT=unit,
            WIDE=triton.next_power_of_2(D),
            num_warps=_warps(D),
        )
    return out


def adam_rows(
    grad: Tensor,
    master: Tensor,
    mean: Tensor,
    square: Tensor,
    param: Tensor,
    clip: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    unit: bool,
) -> None:
    """One update in place; all matrices contiguous, (M, D).

    Parameters
    ----------
    master, mean, square : float32. grad : any float.
    param : what computes; rewritten where it is not the master itself.
    clip : float32 (1,), multiplies the gradient.
    step : this update's number, from 1.
    unit : rows are kept at norm 1, and the gradient along them is left out.
    """
    import triton

    from gossamer.kernels.sparse_code.launch import on
    from gossamer.kernels.sparse_code.triton_adam import adam_rows_kernel

    M, D = master.shape
    with on(master):
        adam_rows_kernel[(M,)](
            grad,
            master,
            mean,
            square,
            param,
            clip,
            lr / (1 - betas[0] ** step),
            betas[0],
            betas[1],
            sqrt(1 - betas[1] ** step),
            eps,
            D,
            UNIT=unit,
            COPY=param.data_ptr() != master.data_ptr(),
            WIDE=triton.next_power_of_2(D),
            num_warps=_warps(D),
        )
