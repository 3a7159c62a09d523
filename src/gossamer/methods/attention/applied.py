"""A selector at work in a model: dispatch of every attention call, report, undo."""

from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Backend, Call, Ran, execute
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.install import Installation, layout_of
from gossamer.methods.attention.layout import Layout
from gossamer.models import Applied, Report, SiteRow, State, find_sites

if TYPE_CHECKING:
    from gossamer.methods.attention.base import AttentionMethod

__all__ = ["KVBytes", "Selector", "SparseAttention"]

_SIMULATED: frozenset[Ran] = frozenset({"masked", "reference"})

# Arguments that change the result of attention and that no executor here knows.
_FOREIGN = ("position_bias", "indices", "block_indices", "cache", "head_mask")


class Selector(ABC):
    """Chooses the keys each query reads."""

    @abstractmethod
    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        """The kept pairs of one call.

        Parameters
        ----------
        call : queries, keys and values of the layer. layout : where they stand.
        layer : index of the layer.
        """

    @abstractmethod
    def pairs(self, length: int, layer: int, own: int | None) -> tuple[int, int]:
        """Pairs kept, and pairs the layer itself reads, for one sequence of a length.

        Parameters
        ----------
        own : the layer's own sliding window, or None.
        """

    @abstractmethod
    def simulated(self, backend: Backend, length: int) -> bool:
        """Whether a prompt of ``length`` tokens would run under a dense mask."""

    @abstractmethod
    def state(self) -> State:
        """What :meth:`AttentionMethod.replan` needs."""

    def notes(self) -> tuple[str, ...]:
        """Facts for the report, in sentences."""
        return ()


class KVBytes(NamedTuple):
    """Bytes of keys and values that one decoded token reads, over all layers."""

    dense: int
    kept: int


class SparseAttention(Applied):
    """A selector at work in a model.

    Attributes
    ----------
    selector : what chooses the keys. length : tokens at which the report counts pairs.
    ran : how many attention calls each executor ran since the method was applied.
    simulated : some calls ran under a dense mask. Before the first call it is what the cost
        rule foresees for a prompt of ``length`` tokens.
    """

    method: "AttentionMethod"

    def __init__(
        self, method: "AttentionMethod", model: nn.Module, selector: Selector, length: int
    ) -> None:
        super().__init__(method, model)
        self.selector, self.length = selector, length
        self.ran: Counter[Ran] = Counter()
        self._sites = find_sites(model)
        self.simulated = selector.simulated(method.backend, length)
        self._installed = Installation(model, method.key(), self._sites.attentions, self._attention)
        self._join()

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | Layout | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """The attention function transformers calls: (B, H, Q, D) in, (B, Q, H, E) out."""
        for name in _FOREIGN:
            if options.get(name) is not None:
                raise GossamerError(
                    f"{type(module).__name__} passes {name!r} to its attention, which "
                    f"{self.method.key()} cannot combine with its own choice of keys"
                )
        layout = layout_of(attention_mask, query, key)
        call = Call(
            query,
            key,
            value,
            scale=scaling,
            softcap=options.get("softcap"),
            sink_logits=options.get("s_aux", options.get("sinks")),
            dropout=dropout,
        )
        layer = getattr(module, "layer_idx", None)
        index = self.selector.select(call, layout, 0 if layer is None else int(layer))
        out, ran = execute(call, index, self.method.backend)
        if not self.ran:
            self.simulated = False
        self.ran[ran] += 1
        self.simulated = self.simulated or ran in _SIMULATED
        return out.transpose(1, 2).contiguous(), None

    def _undo(self) -> None:
        self._installed.undo()

    def state(self) -> State:
        own = self.selector.state()
        return State({**own.meta, "length": self.length}, own.tensors)

    def report(self) -> Report:
        rows = []
        for layer, name in enumerate(self._sites.attentions):
            kept, total = self.selector.pairs(self.length, layer, self._own_window(layer))
            rows.append(SiteRow(name, "attention.scores", layer, total, 1.0 - kept / total))
        return Report(
            method=self.method.to_dict(),
            rows=tuple(rows),
            unit="attention pairs",
            all_size=sum(row.size for row in rows),
            simulated=self.simulated,
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        ran = ", ".join(f"{name} {count}" for name, count in sorted(self.ran.items()))
        return (
            *self.selector.notes(),
            f"pairs are causal pairs of one head at {self.length} tokens",
            f"attention calls run: {ran or 'none yet'}",
            "the key-value cache keeps every key: reading is saved, memory is not",
        )

    def _own_window(self, layer: int) -> int | None:
        """The sliding window the model itself gives a layer."""
        config: Any = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and kinds[layer] != "sliding_attention":
            return None
        return window

    def kv_bytes(self, length: int) -> KVBytes:
        """Keys and values the last of ``length`` tokens reads, dense and with this method.

        Counts rows of the cache in the model's dtype, once per key-value head.
        """
        dense = kept = 0
        for layer in range(len(self._sites.attentions)):
            width = self._kv_width(layer)
            own = self._own_window(layer)
            now = self.selector.pairs(length, layer, own)
            before = self.selector.pairs(length - 1, layer, own) if length > 1 else (0, 0)
            kept += width * (now[0] - before[0])
            dense += width * (now[1] - before[1])
        return KVBytes(dense, kept)

    def _kv_width(self, layer: int) -> int:
        """Bytes of one token's keys and values in a layer."""
        shapes = {s.role: s.shape for s in self._sites.in_block(layer)}
        site = next(s for s in self._sites.in_block(layer) if s.role.startswith("attention"))
        size = site.weight(self.model).element_size()
        if "attention.k" in shapes:
            return (shapes["attention.k"][0] + shapes["attention.v"][0]) * size
        return (shapes["attention.qkv"][0] - shapes["attention.o"][1]) * size
