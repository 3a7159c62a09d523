"""Oracle top-p: every query reads the fewest keys that hold a given share of its attention.

The ceiling of selectors that adapt their budget: how many keys does a share really need?
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.ranked import RankedSelector, first_ranks, true_mass
from gossamer.models import State

__all__ = ["OracleTopP"]


@dataclass(frozen=True)
class CoverageSelector(RankedSelector):
    """The fewest blocks whose mass reaches a share."""

    gamma: float

    def score(self, call: Call, layout: Layout, layer: int, rows: slice) -> Tensor:
        return true_mass(call, layout, rows)

    def keep(self, score: Tensor, seen: Tensor) -> Tensor:
        # Single keys come as logarithms, blocks as sums of probabilities.
        mass = (score.exp() if self.block_size == 1 else score).masked_fill(~seen, 0.0)
        share = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        ordered = share.sort(dim=-1, descending=True, stable=True).values
        # The first entry that reaches the share still belongs to it.
        count = (ordered.cumsum(-1) < self.gamma - _ROUNDING).sum(-1, keepdim=True) + 1
        return first_ranks(score, count)

    def state(self) -> State:
        return State(asdict(self))


_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class OracleTopP(AttentionMethod):
    """Keep the fewest keys, or blocks, whose true attention mass reaches ``gamma``.

    Parameters
    ----------
    gamma : share of the attention mass to keep, in (0, 1].
    block_size : queries and keys of a block that is kept or dropped as one; 1 for single keys.
    """

    card: ClassVar = Card(
        title="Oracle top-p attention",
        year=None,
        arxiv=None,
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores",
        score="true attention probability, averaged over the heads of a group",
        pattern="keys or square blocks",
        budget="share of the attention mass",
        schedule="every call",
        kernel="none: a ceiling to measure against",
        departs="no paper: a control",
    )
    full: ClassVar = {"gamma": 1.0}
    example: ClassVar = {"gamma": 0.6}
    exempt: ClassVar = {
        "dense at sparsity 0": "it has no sparsity",
        "encoders": "the family works on causal decoders",
    }

    gamma: float = 0.9
    block_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.gamma <= 1.0:
            raise GossamerError(f"gamma is {self.gamma}; give a share above 0 and at most 1")
        check_count("block_size", self.block_size, 1)

    def plan(self, model: nn.Module, data: Any, length: int) -> CoverageSelector:
        return CoverageSelector(self.block_size, self.gamma)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CoverageSelector:
        return CoverageSelector(meta["block_size"], meta["gamma"])
