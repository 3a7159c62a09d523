"""Random keys: every query reads its own block and others by lot.

The floor of all selectors at the same number of keys.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, check_count
from gossamer.core.scores.random import uniform_random
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.oracle_top_k import OracleSelector
from gossamer.methods.attention.ranked import check_one_budget
from gossamer.models import State

__all__ = ["RandomKeys"]


@dataclass(frozen=True)
class RandomSelector(OracleSelector):
    """The block of the query and others by lot, the same for all rows and heads."""

    seed: int

    def score(self, call: Call, layout: Layout, layer: int, rows: slice) -> Tensor:
        shape = torch.empty(len(layout.query_index[rows]), layout.keys, device=layout.device)
        place = layout.query_offset + rows.start
        draw = uniform_random(shape, seed=(1000 * self.seed + layer) * 1_000_003 + place)
        own = layout.query_index[rows][:, None] == layout.key_index
        score = draw.masked_fill(own, 1e3)
        return score.masked_fill(~layout.mask(rows), -torch.inf)

    def state(self) -> State:
        return State(asdict(self))


@dataclass(frozen=True, kw_only=True)
class RandomKeys(AttentionMethod):
    """Keep the query's own key and others at random.

    Parameters
    ----------
    sparsity : share of the visible keys every query gives up; 0.5 when no budget is given.
    budget_tokens : keys every query reads instead.
    block_size : queries and keys of a block that is kept or dropped as one; 1 for single keys.
    seed : of the lot.
    """

    card: ClassVar = Card(
        title="Random keys",
        year=None,
        arxiv=None,
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores",
        score="chance",
        pattern="keys or square blocks",
        budget="sparsity over visible keys, or a number of keys",
        schedule="every call",
        kernel="none: a floor to measure against",
        departs="no paper: a control",
    )
    full: ClassVar = {"sparsity": 0.0}
    selects: ClassVar = False
    chunked: ClassVar = "the lot is drawn anew for every call"
    exempt: ClassVar = {
        "padding": "the lot falls on places of the padded sequence",
        "exact sparsity": "every query keeps whole keys, at least one",
        "encoders": "the family works on causal decoders",
    }

    sparsity: float | None = None
    budget_tokens: int | None = None
    block_size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is None and self.budget_tokens is None:
            object.__setattr__(self, "sparsity", 0.5)
        check_one_budget(self.sparsity, self.budget_tokens)
        check_count("block_size", self.block_size, 1)
        if self.budget_tokens is not None:
            check_count("budget_tokens", self.budget_tokens, 1)

    def plan(self, model: nn.Module, data: Any, length: int) -> RandomSelector:
        return RandomSelector(self.block_size, self.sparsity, self.budget_tokens, self.seed)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RandomSelector:
        return RandomSelector(
            meta["block_size"], meta["sparsity"], meta["budget_tokens"], meta["seed"]
        )
