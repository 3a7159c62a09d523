"""The definitions of the gathered products, in torch operations, for any device.

Shapes: B = rows of x, I = in features, O = out features, K = given indices.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name

from gossamer.kernels.gather_gemv.rows import Rows

__all__ = ["ACTIVATIONS", "active", "axpy_reference", "dot_reference", "mlp_reference"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
    "none": lambda x: x,
}


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def active(x: Tensor, cut: Tensor | None, dense: Tensor | None = None) -> Tensor:
    """bool, (B, I): not |x| <= cut. NaN and infinity stay active; so do all of a dense row.

    Parameters
    ----------
    cut : float32, (1,) or (I,), or None for all.
    dense : bool (B,), rows that keep every channel, or None.
    """
    if cut is None:
        return torch.ones_like(x, dtype=torch.bool)
    kept = ~(x.abs() <= cut.to(x.device))
    return kept if dense is None else kept | dense[:, None]


def axpy_reference(
    x: Tensor,
    rows: Rows,
    cut: Tensor | None = None,
    index: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """y[b] = the sum of x[b, j] W[:, j] over the active or the given channels j, plus bias.

    A channel that no row keeps has no product, so its weights have no say.
    """
    wide = _wide(x)
    weight = rows.dense(wide)
    inputs = x.to(wide)
    if index is not None:
        at = index.long()
        y = inputs[:, at] @ weight[:, at].T
    else:
        kept = active(x, cut, dense)
        some = kept.any(0)
        y = inputs.masked_fill(~kept, 0)[:, some] @ weight[:, some].T
    return (y if rows.bias is None else y + rows.bias.to(wide)).to(x.dtype)


def dot_reference(x: Tensor, rows: Rows, index: Tensor) -> Tensor:
    """y[b, k] = W[index[k]] · x[b] + bias[index[k]], (B, K)."""
    wide = _wide(x)
    at = index.long()
    y = x.to(wide) @ rows.dense(wide)[at].T
    return (y if rows.bias is None else y + rows.bias.to(wide)[at]).to(x.dtype)


def mlp_reference(
    x: Tensor,
    gate: Rows | None,
    up: Rows,
    down: Rows,
    *,
    act: str = "silu",
    cuts: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    mid: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """W_d(act(W_g x) ⊙ W_u x) with thresholds on the inputs of gate, up and down, or on act.

    Parameters
    ----------
    gate : None for an MLP without one: W_d act(W_u x).
    cuts : of the inputs of gate, up and down. mid : of act(gate), which decides the neurons.
    """
    act_of = ACTIVATIONS[act]
    if gate is None:
        inner = act_of(axpy_reference(x, up, cuts[1], dense=dense))
    else:
        value = act_of(axpy_reference(x, gate, cuts[0], dense=dense))
        if mid is not None:
            value = value.masked_fill(~active(value, mid, dense), 0)
        inner = value * axpy_reference(x, up, cuts[1], dense=dense)
        if mid is not None:
            # A neuron that is off has no product with what `up` would have been.
            inner = torch.where(active(value, mid, dense), inner, 0)
    return axpy_reference(inner, down, cuts[2], dense=dense)
