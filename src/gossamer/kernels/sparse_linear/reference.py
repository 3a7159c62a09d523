"""The definition of the sparse linear product, in torch operations, for any device."""

import torch
from torch import Tensor

from gossamer.kernels.sparse_linear.pack import Packed

__all__ = ["sparse_linear_reference"]


def sparse_linear_reference(x: Tensor, packed: Packed) -> Tensor:
    """y[b, o] = the sum of W[o, c] x[b, c] over the columns c that row o keeps.

    A weight that is not kept has no product: where it meets NaN or infinity in x, the sum does
    not see it. A dense product with zeros would be NaN there.

    Parameters
    ----------
    x : (B, I), any real float dtype.

    Returns
    -------
    (B, O), dtype of x; computed in float64 if x is, else in float32.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mask = packed.mask()
    dense = torch.zeros(packed.shape, dtype=packed.dtype, device=x.device)
    dense = dense.masked_scatter_(mask, packed.values).to(wide)
    inputs = x.to(wide)
    odd = (~inputs.isfinite()).any(0)
    result = inputs.masked_fill(odd, 0) @ dense.T
    for column in odd.nonzero()[:, 0].tolist():
        terms = inputs[:, column, None] * dense[:, column]
        result += torch.where(mask[:, column], terms, 0)
    return result.to(x.dtype)
