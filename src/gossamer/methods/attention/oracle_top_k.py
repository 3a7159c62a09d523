"""Oracle top-k: every query reads the keys that truly receive the most attention.

The ceiling of all selectors at the same number of keys. It computes every score to choose, so it
is for measuring: what share of the oracle's mass does a cheap estimate reach?
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, check_count
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.ranked import (
    RankedSelector,
    check_one_budget,
    first_ranks,
    true_mass,
)
from gossamer.models import State

__all__ = ["OracleTopK"]


@dataclass(frozen=True)
class OracleSelector(RankedSelector):
    """The blocks of most mass: a share of those visible, or a number of keys."""

    sparsity: float | None
    budget_tokens: int | None

    def score(self, call: Call, layout: Layout, layer: int, rows: slice) -> Tensor:
        return true_mass(call, layout, rows)

    def keep(self, score: Tensor, seen: Tensor) -> Tensor:
        return first_ranks(score, self.count(seen))

    def count(self, seen: Tensor) -> Tensor:
        """Blocks each block of queries keeps, at least one."""
        visible = seen.sum(-1, keepdim=True)
        if self.budget_tokens is not None:
            return torch.full_like(visible, -(-self.budget_tokens // self.block_size))
        assert self.sparsity is not None
        return ((1.0 - self.sparsity) * visible).round().long().clamp_min(1)

    def state(self) -> State:
        return State(asdict(self))


@dataclass(frozen=True, kw_only=True)
class OracleTopK(AttentionMethod):
    """Keep the keys, or blocks of keys, with the largest true attention mass.

    Parameters
    ----------
    sparsity : share of the visible keys every query gives up; 0.5 when no budget is given.
    budget_tokens : keys every query reads instead.
    block_size : queries and keys of a block that is kept or dropped as one; 1 for single keys.

    The heads that share keys share the choice: their probabilities are averaged. Mass is not
    output error: values matter too.
    """

    card: ClassVar = Card(
        title="Oracle top-k attention",
        year=None,
        arxiv=None,
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores",
        score="true attention probability, averaged over the heads of a group",
        pattern="keys or square blocks",
        budget="sparsity over visible keys, or a number of keys",
        schedule="every call",
        kernel="none: a ceiling to measure against",
        departs="no paper: a control",
    )
    full: ClassVar = {"sparsity": 0.0}
    exempt: ClassVar = {
        "exact sparsity": "every query keeps whole keys, at least one",
        "encoders": "the family works on causal decoders",
    }

    sparsity: float | None = None
    budget_tokens: int | None = None
    block_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is None and self.budget_tokens is None:
            object.__setattr__(self, "sparsity", 0.5)
        check_one_budget(self.sparsity, self.budget_tokens)
        check_count("block_size", self.block_size, 1)
        if self.budget_tokens is not None:
            check_count("budget_tokens", self.budget_tokens, 1)

    def plan(self, model: nn.Module, data: Any, length: int) -> OracleSelector:
        return OracleSelector(self.block_size, self.sparsity, self.budget_tokens)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> OracleSelector:
        return OracleSelector(meta["block_size"], meta["sparsity"], meta["budget_tokens"])
