"""Estimates by the selection kernels, where they can run; the same numbers up to rounding.

None of them stores the scores of the last queries or sorts a map of blocks.
"""

from collections.abc import Callable

from torch import Tensor

from gossamer.core.scores.attention_estimate import block_means as plain_means
from gossamer.core.scores.attention_estimate import mass_count
from gossamer.kernels.attention_select import block_means, last_mass, mass_cut, select_refusal
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout

__all__ = ["covering", "means", "tail_mass"]


def tail_mass(
    call: Call, layout: Layout, rows: slice, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Share of the last queries' attention by key and by distance, or None where no kernel can.

    Parameters
    ----------
    rows : of the batch. query : (b, G, R, q, D), the last of which stands at the last key.
    key : (b, G, k, D).

    Returns
    -------
    (b, G, k) twice.
    """
    flat = query.flatten(1, 2)
    if not (layout.causal and layout.regular) or flat.shape[2] > key.shape[2]:
        return None
    if select_refusal(flat, key, queries=flat.shape[2]) is not None or not layout.gapless:
        return None
    first = None
    if layout.padding is not None:
        first = (layout.first[rows] - layout.key_offset).clamp_min(0)
    return last_mass(flat, key, scale=call.factor, softcap=call.softcap, first=first)


def means(tensor: Tensor, block: int, real: Tensor | None) -> Tensor:
    """``block_means`` of core, in one pass where a kernel runs; (B, ..., T, D)."""
    if real is not None or select_refusal(tensor) is not None:
        return plain_means(tensor, block, real)
    found = block_means(tensor.flatten(1, -3), block)
    return found.unflatten(1, tensor.shape[1:-2])


def covering(share: Tensor, mass: float, first_ranks: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The fewest largest entries of every row (b, n) that reach a mass, as a mask.

    Parameters
    ----------
    first_ranks : marks so many of the largest: how it is done where no kernel runs.
    """
    if select_refusal(share[:, :1]) is None:
        return mass_cut(share, mass)
    return first_ranks(share, mass_count(share, mass)[:, None])
