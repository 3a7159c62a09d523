"""Swap: trade removed weights for kept ones until a row's expected output is right again.

A row's expected error is ε = Σ_j (w_ij - ŵ_ij) m_j with m the mean input. Growing a removed
weight takes its part w_ij m_j out of ε, pruning a kept one puts ŵ_ij m_j in. All rows advance
together; each weight moves at most once.
Shapes: O = rows (out features), I = in features, K = candidates looked at in a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows", "swap_in_groups", "swap_in_rows"]


@dataclass(frozen=True)
class Rows:
    """The rows of a layer before swapping.

    Parameters
    ----------
    keep : (O, I) bool, the mask to refine; every row keeps its count.
    part : (O, I), what each weight adds to its row's mean output: ŵ_ij m_j where kept, w_ij m_j
        where removed.
    growth : (O, I), order in which removed weights come back: of the sign of ``part``, larger
        magnitudes first.
    rank : (O, I), order in which kept weights go, the smallest first.
    error : (O,) float64, the expected error ε.
    stop : (O,) float64, a row rests when |ε| is not above this.
    cycles : swaps tried in a row at most.
    same_sign : a row ends before a swap that would turn the sign its ε began with.
    """

    keep: Tensor
    part: Tensor
    growth: Tensor
    rank: Tensor
    error: Tensor
    stop: Tensor
    cycles: int
    same_sign: bool

    def first(self, candidates: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """The best candidates of every row by ``order``: indices (O, K), and how many (O,)."""
        count = min(self.cycles, order.shape[1])
        open_ = torch.where(candidates, order, -torch.inf)
        return open_.topk(count, dim=1).indices, candidates.sum(1).clamp_max(count)

    def growing(self) -> tuple[Tensor, Tensor]:
        """Removed weights that can lower a positive ε, and a negative one: (2, O, K), (2, O)."""
        more = self.first(~self.keep & (self.part > 0), self.growth)
        less = self.first(~self.keep & (self.part < 0), -self.growth)
        return torch.stack((more[0], less[0])), torch.stack((more[1], less[1]))

    def allowed(self, new: Tensor) -> Tensor:
        """(O,) whether a row may take the error ``new``."""
        if not self.same_sign:
            return torch.ones_like(new, dtype=torch.bool)
        return new.sign() == self.error.sign()


def swap_in_rows(rows: Rows) -> Tensor:
    """Refine a mask without structure; returns the new mask (O, I).

    A positive ε is lowered by growing the removed weight with the largest ``growth`` and pruning
    the kept weight of negative part with the lowest rank; a negative ε by the mirror image. A
    row ends when its ε is small, when a swap is not allowed, or when a side has no candidate.
    """
    grown, growable = rows.growing()
    less = rows.first(rows.keep & (rows.part < 0), -rows.rank)
    more = rows.first(rows.keep & (rows.part > 0), -rows.rank)
    pruned = torch.stack((less[0], more[0]))
    most = torch.minimum(growable, torch.stack((less[1], more[1])))
    gain = torch.stack(
        [
            rows.part.gather(1, out).double() - rows.part.gather(1, back).double()
            for back, out in zip(grown, pruned, strict=True)
        ]
    )
    used = torch.zeros_like(most)
    row = torch.arange(len(rows.keep), device=rows.keep.device)
    error, active = rows.error.clone(), torch.ones_like(row, dtype=torch.bool)
    for _ in range(rows.cycles):
        side = (error < 0).long()
        at = used[side, row]
        new = error + gain[side, row, at.clamp_max(gain.shape[2] - 1)]
        active &= (error.abs() > rows.stop) & (at < most[side, row]) & rows.allowed(new)
        if not bool(active.any()):
            break
        error = torch.where(active, new, error)
        used[side, row] += active
    keep = rows.keep.clone()
    order = torch.arange(grown.shape[2], device=keep.device)
    for back, out, count in zip(grown, pruned, used, strict=True):
        owner, place = (order < count[:, None]).nonzero(as_tuple=True)
        keep[owner, back[owner, place]] = True
        keep[owner, out[owner, place]] = False
    return keep


def swap_in_groups(rows: Rows, of: int) -> Tensor:
    """Refine an N:M mask; returns the new mask (O, I), each group keeping its count.

    As :func:`swap_in_rows`, but the weight pruned is that of lowest rank in the grown weight's
    group. A candidate whose group has none of the right sign is passed over; that counts as a
    cycle.

    Parameters
    ----------
    of : M, the columns of a group.
    """
    grown, most = rows.growing()
    keep, part = rows.keep.clone(), rows.part
    # Ranks of what may go while ε is positive, and while it is negative.
    ranks = torch.stack(
        [
            torch.where(keep & side, rows.rank, torch.inf).view(len(keep), -1, of)
            for side in (part < 0, part > 0)
        ]
    )
    used = torch.zeros_like(most)
    row = torch.arange(len(keep), device=keep.device)
    error, active = rows.error.clone(), torch.ones_like(row, dtype=torch.bool)
    for _ in range(rows.cycles):
        side = (error < 0).long()
        at = used[side, row]
        back = grown[side, row, at.clamp_max(grown.shape[2] - 1)]
        lowest, place = ranks[side, row, back // of].min(1)
        out = back // of * of + place
        new = error + part[row, out].double() - part[row, back].double()
        found = torch.isfinite(lowest)
        active &= (error.abs() > rows.stop) & (at < most[side, row])
        active &= rows.allowed(new) | ~found
        if not bool(active.any()):
            break
        used[side, row] += active
        swap = active & found
        error = torch.where(swap, new, error)
        own, back, out = row[swap], back[swap], out[swap]
        keep[own, back], keep[own, out] = True, False
        ranks[:, own, out // of, out % of] = torch.inf
    return keep
