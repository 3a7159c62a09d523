"""Rules that keep a fixed number of latents of every token: TopK, AbsTopK, TopK by gradient.

Shapes: R = rows, M = latents.
"""

from typing import Any

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.methods.features.rules.base import (
    Batch,
    Codes,
    Rule,
    Step,
    check_k,
    combine,
    read,
    rectified,
    top_rows,
)

__all__ = ["AbsTopK", "GradientTopK", "TopK"]


class TopK(Rule):
    """The k largest pre-activations of each row, where positive: at most k, never more.

    Parameters
    ----------
    multi : also ask that 4k latents reconstruct, at 1/8 of the weight (Multi-TopK), so that the
        code works at other k; only training reads it.

    Source: arXiv 2406.04093, §2.3 and §5.3.
    """

    architecture = "topk"
    gathers = True

    def __init__(self, k: int, *, multi: bool = False) -> None:
        super().__init__()
        self.k, self.multi = check_k(k), multi

    @property
    def budget(self) -> int:
        return self.k

    def forward(self, pre: Tensor, batch: Batch | None = None) -> Codes:
        return rectified(read(pre, top_rows(pre.detach(), self.k), batch))

    def penalty(self, step: Step) -> Tensor | None:
        if not self.multi:
            return None
        wider = top_rows(step.pre.detach(), min(4 * self.k, step.pre.shape[1]))
        wide = rectified(read(step.pre, wider, step.batch))
        atoms = step.batch.atoms
        error = step.error + combine(step.codes, atoms) - combine(wide, atoms)
        return error.square().sum() / 8

    def config(self) -> dict[str, Any]:
        return {"k": self.k}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TopK":
        return cls(config["k"])


class AbsTopK(Rule):
    """The k pre-activations of each row that are furthest from zero, signs kept.

    One step of proximal gradient descent from zero on the error under ‖z‖₀ <= k, as
    :class:`TopK` is under ‖z‖₀ <= k and z >= 0.

    Source: arXiv 2510.00404, §3.
    """

    architecture = "abstopk"
    gathers = True
    encoder_bias = False

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check_k(k)

    @property
    def budget(self) -> int:
        return self.k

    def forward(self, pre: Tensor, batch: Batch | None = None) -> Codes:
        return read(pre, top_rows(pre.detach().abs(), self.k), batch)

    def revive(self, pre: Tensor, pool: Tensor, keep: int, batch: Batch | None = None) -> Codes:
        return read(pre, pool[top_rows(pre.detach()[:, pool].abs(), keep)], batch)

    def config(self) -> dict[str, Any]:
        return {"k": self.k}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "AbsTopK":
        return cls(config["k"])


class GradientTopK(TopK):
    """The k latents of a row that matter most to the model's loss, in training.

    A positive pre-activation a_i of an atom d_i is ranked by a_i (1 + beta |d_i · g|), with g the
    gradient of the loss by the row, scaled to norm sqrt(D): the influence of a random atom is
    then about 1 at every token. Where no gradient is given, as after training, this is TopK.

    Source: arXiv 2411.10397; the scale of g is ours.
    """

    wants_gradient = True

    def __init__(self, k: int, beta: float = 1.0) -> None:
        super().__init__(k)
        if not 0 <= beta < float("inf"):
            raise GossamerError(f"beta is {beta!r}; give a number, at least 0")
        self.beta = beta

    def forward(self, pre: Tensor, batch: Batch | None = None) -> Codes:
        if batch is None or batch.gradient is None:
            return super().forward(pre, batch)
        gradient = batch.gradient.detach()
        size = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        unit = gradient / size.clamp_min(1e-30) * gradient.shape[1] ** 0.5
        influence = (unit.to(pre.dtype) @ batch.atoms.detach().T.to(pre.dtype)).abs()
        positive = pre.detach().relu()
        indices = top_rows(positive * (1 + self.beta * influence), self.k)
        return rectified(read(pre, indices, batch))
