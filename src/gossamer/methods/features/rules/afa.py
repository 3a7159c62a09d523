"""top-AFA: just enough latents that the code is as long as the input.

Shapes: R = rows, M = latents.
"""

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.features.rules.base import Batch, Codes, Rule, Step, read, rectified, top_rows

__all__ = ["TopAFA"]

_FIRST = 32


class TopAFA(Rule):
    """The largest z_i ‖d_i‖, as many as bring their joint norm closest to that of x - b_dec.

    For nearly orthogonal atoms ‖x̂ - b_dec‖² is about sum_i (z_i ‖d_i‖)²: no k is needed. Of two
    counts that come equally close the smaller is taken. The penalty, gamma times the mean over
    rows of (‖z‖ - ‖x - b_dec‖)² beside an error averaged over channels, makes the fit possible.

    Parameters
    ----------
    gamma : weight of the penalty, >= 0; the paper sweeps 1/128 to 1/16.

    Source: arXiv 2503.24277, §4.
    """

    architecture = "topafa"
    gathers = True

    def __init__(self, gamma: float = 1 / 32) -> None:
        super().__init__()
        if not 0 <= gamma < float("inf"):
            raise GossamerError(f"gamma is {gamma!r}; give a number, at least 0")
        self.gamma = gamma

    def forward(self, pre: Tensor, batch: Batch | None = None) -> Codes:
        assert batch is not None
        loud = pre.detach().relu() * batch.atoms.detach().norm(dim=1)
        goal = torch.linalg.vector_norm((batch.rows - batch.offset).detach(), dim=1)
        latents = pre.shape[1]
        # Silent latents would all tie at the edge; below zero they have an order, the columns'.
        below = -torch.arange(1, latents + 1, dtype=loud.dtype, device=loud.device)
        ranked = torch.where(loud > 0, loud, below)
        # A full sort is rarely needed: widen until every row has reached its norm.
        wide = latents if latents <= 4 * _FIRST else _FIRST
        while True:
            order = top_rows(ranked, wide)
            sizes, rank = loud.gather(1, order).sort(dim=1, descending=True, stable=True)
            order, lengths = order.gather(1, rank), sizes.square().cumsum(1).sqrt()
            if wide == latents or bool((lengths[:, -1] >= goal).all()):
                break
            wide = min(4 * wide, latents)
        count = 1 + (lengths - goal[:, None]).abs().argmin(1)
        wide = int(count.max()) if len(count) else 1
        kept = torch.arange(wide, device=pre.device) < count[:, None]
        return rectified(read(pre, order[:, :wide].masked_fill(~kept, -1), batch))

    def penalty(self, step: Step) -> Tensor:
        batch, codes = step.batch, step.codes
        sizes = batch.atoms.norm(dim=1)[codes.indices.clamp_min(0)]
        # The square root has no derivative at a code of zeros.
        length = (codes.values * sizes).square().sum(1).clamp_min(1e-12).sqrt()
        goal = torch.linalg.vector_norm(batch.rows - batch.offset, dim=1)
        return self.gamma * batch.rows.shape[1] * (length - goal).square().sum()
