"""Baselines of claims of tuning: a mask that stays, and a low-rank update that trains under it."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer.core import Budget, Card, Selection, Site, Unstructured
from gossamer.methods.tuning.base import Adapter, Tuning

__all__ = ["MaskedLoRA"]


class _Fixed(Adapter):
    """M ∘ (W + B A) with a mask M that stays."""

    mask: Tensor

    def __init__(self, weight: Tensor, mask: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, into = weight.shape
        noise = (torch.rand(rank, into, generator=generator) * 2 - 1) / sqrt(into)
        self.down = nn.Parameter(noise.to(weight.device))
        self.up = nn.Parameter(torch.zeros(out, rank, device=weight.device))
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, self.folded(weight), bias)

    def folded(self, weight: Tensor) -> Tensor:
        return ((weight + self.up @ self.down) * self.mask).to(weight.dtype)

    @property
    def selection(self) -> Selection:
        return Selection.from_mask(self.mask)


@dataclass(frozen=True, kw_only=True)
class MaskedLoRA(Tuning):
    """Choose a mask once from the untuned weights, then train a low-rank update under it.

    Parameters
    ----------
    mask : ``magnitude`` or ``random``, per matrix; sparsity 0 is plain LoRA.
    """

    card = Card(
        title="LoRA under a fixed mask",
        year=None,
        family="tuning",
        when="during training",
        site="linear weight",
        score="|w| or none",
        pattern="unstructured by layer",
        budget="the same share of every matrix",
    )

    sparsity: float = 0.8
    rank: int = 8
    mask: Literal["magnitude", "random"] = "magnitude"

    def adapter(self, site: Site, weight: Tensor, generator: torch.Generator) -> Any:
        """One matrix's mask and its factors."""
        score = weight.abs().float()
        if self.mask == "random":
            score = torch.rand(weight.shape, generator=generator).to(weight.device)
        chosen = Unstructured("layer").select(score, Budget(sparsity=self.sparsity))
        return _Fixed(weight, chosen.mask(), self.rank, generator)
