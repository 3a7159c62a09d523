"""Training indexers: their softmax over keys should be the layer's own attention, head-averaged.

The model runs without gradients and shows every attention call; a sample of its queries teaches
the layer's indexer by the divergence KL(attention || indexer). Only the indexers learn.
Shapes: B = batch, G = key-value heads, R = query heads per key-value head, q = sampled queries,
K = keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gossamer.core.scores.attention_estimate import last_query_weights
from gossamer.methods.attention.applied import SparseAttention
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import FullIndex
from gossamer.methods.attention.indexer.module import Indexer, index_scores
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.models import Progress, State, Tokens
from gossamer.models.capture import evaluating
from gossamer.models.fit import FitPlan, fit

if TYPE_CHECKING:
    from gossamer.methods.attention.base import AttentionMethod

__all__ = ["Witness", "divergence", "summed_attention", "train_indexers"]

QUERIES = 64
"""Queries of a sequence that teach in one update."""


@dataclass(frozen=True)
class Witness(Selector):
    """Keeps everything and notes every call of the layers that learn."""

    stateful = True
    layers: frozenset[int]
    seen: dict[int, tuple[Call, Layout]] = field(default_factory=dict, compare=False)

    def select(self, call: Call, layout: Layout, layer: int) -> FullIndex:
        if layer in self.layers:
            self.seen[layer] = call, layout
        return FullIndex(layout)

    def simulated(self, backend: str, length: int) -> bool:
        return False

    def state(self) -> State:
        return State()


def summed_attention(call: Call, layout: Layout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of some queries summed over all heads, each row scaled to sum 1.

    Parameters
    ----------
    rows : int64, (q,), places of the queries in the call.

    Returns
    -------
    weights : (B, q, K). seen : bool, (B or 1, q, K).
    """
    at = layout.query_index[rows].view(1, 1, -1, 1)
    seen = layout.sees(at, layout.key_index.view(1, 1, 1, -1))
    seen = seen.expand(-1, -1, len(rows), layout.keys)
    query = call.grouped_query()[:, :, :, rows]
    weights = last_query_weights(query, call.key, call.factor, seen, call.softcap).mean(1)
    return weights, seen[:, 0]


def divergence(
    indexer: Indexer, call: Call, layout: Layout, rows: Tensor, position: Tensor
) -> Tensor:
    """KL(attention || softmax of the indexer), the mean over queries that see any key.

    Parameters
    ----------
    position : (B or 1, Q), logical, of a prompt given at once.
    """
    assert call.hidden is not None
    weights, seen = summed_attention(call, layout, rows)
    query, weight = indexer.queries(call.hidden[:, rows], position[:, rows])
    score = index_scores(query, weight, indexer.keys(call.hidden, position))
    score = score.masked_fill(~seen, -torch.inf)
    # A row that sees nothing (padding) would be NaN; it does not count.
    real = seen.any(-1).expand(len(score), -1)
    logs = torch.log_softmax(score.masked_fill(~real[..., None], 0.0), dim=-1)
    lost = torch.special.xlogy(weights, weights) - weights * logs.masked_fill(~seen, 0.0)
    return (lost.sum(-1) * real).sum() / real.sum().clamp_min(1)


def train_indexers(
    method: "AttentionMethod",
    model: nn.Module,
    tokens: Tokens,
    indexers: Mapping[int, Indexer],
    plan: FitPlan,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """Fit every layer's indexer to its layer's attention; the model does not change.

    Returns
    -------
    The divergence in nats before every update, the mean over layers.
    """
    witness = Witness(frozenset(indexers))
    generator = torch.Generator().manual_seed(plan.seed)
    parameters = [p for indexer in indexers.values() for p in indexer.parameters()]
    body = getattr(model, "base_model", model)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        witness.seen.clear()
        with torch.no_grad(), evaluating(model):
            body(**batch, use_cache=False)
        total = torch.zeros((), device=batch["input_ids"].device)
        for layer, (call, layout) in witness.seen.items():
            drawn = torch.randperm(layout.queries, generator=generator)[:QUERIES]
            rows = drawn.sort().values.to(call.query.device)
            position = layout.position[:, : layout.queries].clamp_min(0)
            total = total + divergence(indexers[layer], call, layout, rows, position)
        return total / len(indexers)

    # A measured break-even would leave the witness out of some calls.
    with SparseAttention(replace(method, backend="auto"), model, witness, tokens.length):
        losses = fit(
            model,
            tokens,
            plan,
            parameters=parameters,
            loss=loss,
            progress=progress,
            what="training indexers",
        )
    witness.seen.clear()
    return losses
