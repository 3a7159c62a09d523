"""The definition of the sparse 1x1 convolution, in torch operations, for any device."""

import torch
from torch import Tensor

from gossamer.kernels.sparse_conv.pack import PackedConv

__all__ = ["sparse_conv_reference"]


def sparse_conv_reference(
    x: Tensor, packed: PackedConv, low: float = -torch.inf, high: float = torch.inf
) -> Tensor:
    """y[n, o, p] = bias[o] + the sum of W[o, c] x[n, c, p] over the channels c that o stores.

    Then clamped to [low, high]. A weight that is not stored has no product: where it meets NaN or
    infinity in x, the sum does not see it.

    Parameters
    ----------
    x : (N, I, P), any real float dtype.

    Returns
    -------
    (N, O, P), dtype of x; computed in float64 if x is, else in float32.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dense, bias = (t.to(wide) for t in packed.to_dense())
    inputs = x.to(wide)
    odd = (~inputs.isfinite()).any(2).any(0)
    result = torch.einsum("oi,nip->nop", dense, inputs.masked_fill(odd[:, None], 0))
    stored = packed.stored()
    for channel in odd.nonzero()[:, 0].tolist():
        terms = dense[:, channel, None] * inputs[:, None, channel]
        result += torch.where(stored[:, channel, None], terms, 0)
    return (result + bias[:, None]).clamp(low, high).to(x.dtype)
