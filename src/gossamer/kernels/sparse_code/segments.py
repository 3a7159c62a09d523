"""Which entries of a code name an atom: the code turned by atom, ready for sums in one order.

Shapes: R = rows, K = entries of a row, E = R K, M = atoms, L = entries of a piece, P = E // L.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PIECE", "Segments"]

PIECE = 128
"""L: an atom with more entries is summed in pieces, or one common atom would hold up all."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Entries in the order of their atoms, rows ascending within an atom.

    Parameters
    ----------
    order : int64 (E,), places of the entries in the flat code; padding last.
    tokens : int32 (E,), their rows.
    start : int64 (M + 1,), where an atom's entries begin.
    owner : int64 (P,), the atom of each piece after its first; M for none.
    before : int64 (M + 1,), such pieces of the atoms before.
    """

    order: Tensor
    tokens: Tensor
    start: Tensor
    owner: Tensor
    before: Tensor

    @classmethod
    def of(cls, indices: Tensor, count: int) -> "Segments":
        """Of (R, K) indices below ``count``, -1 for padding; nothing waits for the device."""
        flat = indices.reshape(-1).to(torch.int32)
        keys, order = flat.where(flat >= 0, count).sort(stable=True)
        start = torch.searchsorted(keys, torch.arange(count + 1, device=keys.device).int())
        further = ((start.diff() - 1).clamp_min(0)) // PIECE
        ends = further.cumsum(0)
        before = torch.cat([ends.new_zeros(1), ends])
        pieces = torch.arange(len(flat) // PIECE, device=keys.device)
        owner = torch.searchsorted(ends, pieces, right=True)
        tokens = (order // indices.shape[1]).to(torch.int32)
        return cls(order, tokens, start, owner, before)
