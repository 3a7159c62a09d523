"""Double Sparsity: a few key channels tell which keys matter, and those channels hardly change.

Which channels carry q . k is a trait of the head, so it is found once, on any text. While decoding,
a small cache of these channels alone (labels) ranks the keys; exact attention reads the best.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, check_count, check_sparsity, kept_count
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.decoding.choose import Amount, best, index_of
from gossamer.methods.attention.decoding.labels import (
    channel_loads,
    label_weights,
    remembered_labels,
)
from gossamer.methods.attention.decoding.record import calibration_rows, record
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import BlockIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.models import Progress, State

__all__ = ["DoubleSparsity"]


@dataclass(frozen=True, eq=False)
class LabelSelector(Selector):
    """The keys whose labels score best, and the latest ones.

    Parameters
    ----------
    channels : int64, (layers, G, r), the channels kept of each head, ascending.
    """

    channels: Tensor
    sparsity: float | None
    budget_tokens: int | None
    local: int
    quantize_labels: bool

    stateful: ClassVar[bool] = True

    def select(self, call: Call, layout: Layout, layer: int) -> BlockIndex:
        channels = self.channels[layer].to(call.key.device)
        labels = remembered_labels(call, layout, channels, self.quantize_labels)
        query = call.grouped_query()
        batch, _, repeat, queries, width = query.shape
        query = query.gather(
            4, channels[None, :, None, None].expand(batch, -1, repeat, queries, -1)
        )
        # 1 / sqrt(r) for the usual 1 / sqrt(D).
        scale = call.factor * (width / channels.shape[1]) ** 0.5
        score = label_weights(query, labels, scale, layout.mask())
        amount = Amount(self.sparsity, self.budget_tokens)
        return index_of(layout, best(score, layout, amount, self.local))

    def state(self) -> State:
        meta = {
            "sparsity": self.sparsity,
            "budget_tokens": self.budget_tokens,
            "local": self.local,
            "quantize_labels": self.quantize_labels,
        }
        return State(meta, {"channels": self.channels.short()})

    def notes(self) -> tuple[str, ...]:
        bits = ", at 4 bits each" if self.quantize_labels else ""
        return (f"labels hold {self.channels.shape[2]} channels of every key{bits}",)


@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(AttentionMethod):
    """While decoding, rank keys by a few channels fixed beforehand, read the best of them.

    Parameters
    ----------
    sparsity : share of the visible keys a query leaves out, in [0, 1); 0.5 when no budget is
        given. The paper's point is 15/16.
    budget_tokens : keys a query reads instead.
    channel_sparsity : share of the key channels that labels leave out, in [0, 1); at least one
        channel stays. The paper's point is 15/16, its evaluation code uses 3/4 and 7/8.
    quantize_labels : keep labels at four bits a channel, scaled per token.
    local : latest keys read whatever their labels say, the query's own among them, >= 1.
    samples, sample_length : sequences of the data, and tokens of each, that channels are ranked on.
    dense_layers : first layers that keep full attention; 2 as in the reference code.

    Notes
    -----
    ``apply`` needs data: it runs the model on them once and ranks the channels of each head by the
    mean of |q_j k_j| over tokens, after the rotary embedding.

    Departs from the paper: heads that share keys share channels and keys (channel loads and
    estimated probabilities are averaged); the latest ``local`` keys are always read, for the
    reference may drop the token just written. Keys are not offloaded.
    """

    card: ClassVar = Card(
        title="Post-Training Sparse Attention with Double Sparsity",
        system="double_sparsity",
        year=2024,
        arxiv="2408.07092",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores of decoded tokens",
        score="q . k over the channels with the largest mean |q_j k_j|",
        pattern="keys per query and key-value head",
        budget="number of keys, or sparsity over visible keys",
        schedule="channels once before, keys at every decoded token",
        kernel="label cache, key gather, fused attention",
        departs="a group of heads shares channels and keys; the latest keys are always read; "
        "no offloading",
    )
    phases: ClassVar = frozenset({"decode"})
    subject: ClassVar = "decoding language model"
    full: ClassVar = {"sparsity": 0.0}
    example: ClassVar = {"channel_sparsity": 0.5, "dense_layers": 0, "local": 2}
    exempt: ClassVar = {
        "exact sparsity": "a query reads whole keys, the latest ones always",
        "encoders": "the family works on causal decoders",
    }

    sparsity: float | None = None
    budget_tokens: int | None = None
    channel_sparsity: float = 0.9375
    quantize_labels: bool = False
    local: int = 16
    samples: int = 256
    sample_length: int = 512
    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        Amount.check(self)
        check_sparsity(self.channel_sparsity, "channel_sparsity")
        for name in ("local", "samples", "sample_length"):
            check_count(name, getattr(self, name), 1)

    def plan(self, model: nn.Module, data: Any, length: int) -> LabelSelector:
        return self.planned(model, data, length, None)

    def planned(
        self, model: nn.Module, data: Any, length: int, progress: Progress | None
    ) -> LabelSelector:
        rows = calibration_rows(self.key(), data, model, self.samples, self.sample_length)
        loads: dict[int, Tensor] = {}

        def visit(call: Call, layout: Layout, layer: int) -> None:
            real = None if layout.padding is None else layout.position >= 0
            found = channel_loads(call.grouped_query(), call.key, real).cpu()
            loads[layer] = loads[layer] + found if layer in loads else found

        record(model, rows, visit, progress)
        load = torch.stack([loads[layer] for layer in sorted(loads)])
        count = max(1, kept_count(load.shape[2], self.channel_sparsity))
        best_first = load.argsort(dim=-1, descending=True, stable=True)
        return self._selector(best_first[..., :count].sort(-1).values)

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LabelSelector:
        return self._selector(tensors["channels"].long())

    def _selector(self, channels: Tensor) -> LabelSelector:
        return LabelSelector(
            channels, self.sparsity, self.budget_tokens, self.local, self.quantize_labels
        )
