"""A selector at work in a model: dispatch of every attention call, report, undo."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.attention.breakeven import BreakEven
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import EXECUTORS, choose, run
from gossamer.methods.attention.index import FullIndex, KeyIndex
from gossamer.methods.attention.install import Installation, layout_of
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.measure import Kept, Tally, walk
from gossamer.methods.attention.memory import LayerState, Memory
from gossamer.methods.attention.selector import Selector
from gossamer.models import Applied, Report, SiteRow, State, Tokens, find_sites

if TYPE_CHECKING:
    from gossamer.methods.attention.base import AttentionMethod

__all__ = ["KVBytes", "SparseAttention", "attention_shape"]

# Arguments that change the result of attention and that no executor here knows.
_FOREIGN = ("position_bias", "indices", "block_indices", "cache", "head_mask")


class KVBytes(NamedTuple):
    """Bytes of keys and values over all layers: read by one decoded token, or held."""

    dense: int
    kept: int


class SparseAttention(Applied):
    """A selector at work in a model.

    Attributes
    ----------
    selector : what chooses the keys. length : tokens at which the report counts pairs.
    ran : how many attention calls each executor ran since the method was applied.
    guarded : calls left full because the layer is among the first or the context too short.
    measured : what was kept, by layer and phase, when it was last measured.
    simulated : some calls ran under a dense mask. Before the first call it is what the cost
        rule foresees for a prompt of ``length`` tokens.
    """

    method: "AttentionMethod"

    def __init__(
        self, method: "AttentionMethod", model: nn.Module, selector: Selector, length: int
    ) -> None:
        super().__init__(method, model)
        self.selector, self.length = selector, length
        self.ran: Counter[str] = Counter()
        self.guarded = 0
        self.measured: tuple[Kept, ...] = ()
        self.breakeven = BreakEven()
        self._sites = find_sites(model)
        self._memory = Memory()
        self._tally: Tally | None = None
        self._step: dict[str, Any] = {}
        self._given: dict[nn.Module, tuple[Any, Tensor | None]] = {}
        self.simulated = selector.simulated(method.backend, length)
        self._installed = Installation(model, method.key(), self._sites.attentions, self._attention)
        self._hooks = self._listen() if selector.stateful else []
        self._join()

    def _listen(self) -> list[Any]:
        """Note what every attention module is called with; the function itself is not told."""
        modules = [self.model.get_submodule(path) for path in self._sites.attentions]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is modules[0]:
                self._step = {}
            given = [*args, *kwargs.values()]
            cache = next((x for x in given if hasattr(x, "get_seq_length")), None)
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            self._given[module] = (cache, hidden if isinstance(hidden, Tensor) else None)

        listen: Any = torch.compiler.disable(before)
        return [m.register_forward_pre_hook(listen, with_kwargs=True) for m in modules]

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
        number = getattr(module, "layer_idx", None)
        layer = 0 if number is None else int(number)
        cache, hidden = self._given.pop(module, (None, None))
        call = Call(
            query,
            key,
            value,
            scale=scaling,
            softcap=options.get("softcap"),
            sink_logits=options.get("s_aux", options.get("sinks")),
            dropout=dropout,
            state=self._memory.of(cache, layer) if self.selector.stateful else LayerState(),
            step=self._step if self.selector.stateful else {},
            cache=cache,
            hidden=hidden,
        )
        out = self._attend(call, layout, layer)
        # Measuring compares with all keys, so the cache keeps them meanwhile.
        if self.selector.stateful and self._tally is None:
            self.selector.after(call, layout, layer)
        return out.transpose(1, 2).contiguous(), None

    def _attend(self, call: Call, layout: Layout, layer: int) -> Tensor:
        """(B, H, Q, E); notes which executor ran and, while measuring, what was kept."""
        if self._stays_full(call, layout, layer):
            return self._run("dense", call, FullIndex(layout), layer)
        weighed = self.method.backend == "fastest" and self._tally is None
        if weighed and self.selector.weighable(call, layout, layer):
            if self.breakeven.prefers_dense(call, layout):
                self._observe(call, layout, layer)
                return self._run("dense", call, FullIndex(layout), layer)
            with self.breakeven.timed(call, layout) as part:
                index = self.selector.select(call, layout, layer)
                part()
                name = choose(index, "auto", call)
                return self._run(name, call, index, layer)
        index = self.selector.select(call, layout, layer)
        return self._run(choose(index, self.method.backend, call), call, index, layer)

    def _stays_full(self, call: Call, layout: Layout, layer: int) -> bool:
        """Whether phase or guards leave a call its full attention."""
        sparse = layout.phase in self.method.phases
        guarded = layer < self.method.dense_layers or layout.end < self.method.min_length
        if (sparse and not guarded) or self.selector.owns(call, layer):
            return False
        self.guarded += sparse
        self._observe(call, layout, layer)
        return True

    def _observe(self, call: Call, layout: Layout, layer: int) -> None:
        if self.selector.observes:
            self.selector.observe(call, layout, layer)

    def _run(self, name: str, call: Call, index: KeyIndex, layer: int) -> Tensor:
        if not self.ran:
            self.simulated = False
        self.ran[name] += 1
        self.simulated = self.simulated or EXECUTORS[name].simulated
        if self._tally is not None:
            self._tally.add(layer, call, index)
        return run(name, call, index)

    def _undo(self) -> None:
        self._installed.undo()
        for hook in self._hooks:
            hook.remove()
        self._given.clear()
        self._step = {}
        self._memory.forget()

    # -- what was kept -----------------------------------------------------------------------

    @property
    def measured_only(self) -> bool:
        """Whether the pairs kept depend on the input."""
        layers = range(len(self._sites.attentions))
        return any(
            self.selector.pairs(self.length, layer, self._own_window(layer)) is None
            for layer in layers
        )

    @contextmanager
    def tallying(self) -> Iterator[Tally]:
        """Count pairs and attention mass of every call inside; costs dense scores."""
        self._tally = Tally(self.method.phases)
        try:
            yield self._tally
        finally:
            self._tally = None

    def measure(self, tokens: Tokens, decode: int = 16) -> tuple[Kept, ...]:
        """What is kept of each layer on some tokens, and its share of the attention mass.

        Parameters
        ----------
        decode : tokens at the end of each sequence that are given one by one, where the method
            acts on decoding.
        """
        clipped = Tokens(
            tokens.input_ids[:, : self.length], tokens.attention_mask[:, : self.length]
        )
        ran, guarded = Counter(self.ran), self.guarded
        with self.tallying() as tally:
            walk(self.model, clipped, decode if "decode" in self.method.phases else 0)
        # Measuring is no use of the model.
        self.ran, self.guarded = ran, guarded
        self.measured = tally.kept()
        return self.measured

    def remember(self, measured: Iterable[Mapping[str, Any]]) -> None:
        """Take over what was measured before the method was saved."""
        self.measured = tuple(Kept(**row) for row in measured)

    def state(self) -> State:
        own = self.selector.state()
        measured = [row._asdict() for row in self.measured]
        meta = {**own.meta, "length": self.length, "measured": measured}
        return State({**meta, "shape": attention_shape(self.model)}, own.tensors)

    def report(self) -> Report:
        rows = []
        for layer, name in enumerate(self._sites.attentions):
            kept, total = self._pairs(layer)
            gone = 1.0 - kept / total if total else 0.0
            rows.append(SiteRow(name, "attention.scores", layer, total, gone))
        return Report(
            method=self.method.to_dict(),
            rows=tuple(rows),
            unit="attention pairs",
            all_size=sum(row.size for row in rows),
            simulated=self.simulated,
            notes=self._notes(),
        )

    def _pairs(self, layer: int) -> tuple[int, int]:
        """Pairs kept and pairs in all of one layer, computed or else measured."""
        found = self._static(self.length, layer)
        if found is not None:
            return found
        rows = [row for row in self.measured if row.layer == layer]
        return sum(row.kept for row in rows), sum(row.total for row in rows)

    def _static(self, length: int, layer: int) -> tuple[int, int] | None:
        found = self.selector.pairs(length, layer, self._own_window(layer))
        if found is not None and layer < self.method.dense_layers:
            return found[1], found[1]
        return found

    def _notes(self) -> tuple[str, ...]:
        ran = ", ".join(f"{name} {count}" for name, count in sorted(self.ran.items()))
        notes = [*self.selector.notes()]
        if not self.measured_only:
            notes.append(f"pairs are causal pairs of one head at {self.length} tokens")
        elif self.measured:
            notes += [_phase_note(self.measured, phase) for phase in sorted(self.method.phases)]
        else:
            notes.append("not measured yet: give apply() data, or call measure(tokens)")
        notes.append(f"attention calls run: {ran or 'none yet'}")
        if self.guarded:
            notes.append(f"{self.guarded} of them kept full by dense_layers or min_length")
        notes += self.breakeven.notes()
        if self.selector.evicts:
            notes += self._cache_note()
        else:
            notes.append("the key-value cache keeps every key: reading is saved, memory is not")
        return tuple(note for note in notes if note)

    def _cache_note(self) -> list[str]:
        if self.selector.holds(self.length, 0) is None:
            return []
        held = self.cache_bytes(self.length)
        share = held.kept / held.dense if held.dense else 1.0
        return [
            f"at {self.length} tokens a dynamic cache holds {held.kept} of {held.dense} bytes of "
            f"keys and values ({share:.1%}) once decoding has begun; others (static, quantized) "
            "keep every key"
        ]

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
            now = self._static(length, layer)
            before = self._static(length - 1, layer) if length > 1 else (0, 0)
            if now is None or before is None:
                raise GossamerError(
                    f"the keys {self.method.key()} reads depend on the input; see measure(tokens)"
                )
            kept += width * (now[0] - before[0])
            dense += width * (now[1] - before[1])
        return KVBytes(dense, kept)

    def cache_bytes(self, length: int) -> KVBytes:
        """Keys and values a cache holds after ``length`` tokens, dense and with this method.

        For one sequence, in the model's dtype, right after an eviction; until the next, every new
        token is held. Where a key stood takes 4 bytes more.

        Raises
        ------
        GossamerError
            If the keys that go depend on the input.
        """
        dense = kept = 0
        for layer in range(len(self._sites.attentions)):
            width = self._kv_width(layer) * length
            heads = None
            if layer >= self.method.dense_layers and self._own_window(layer) is None:
                heads = self.selector.holds(length, layer)
            dense += width
            if heads is None or min(heads) >= length:
                kept += width
            else:
                kept += sum(heads) * (width // length // len(heads))
        if self.selector.evicts and self.selector.holds(length, 0) is None:
            raise GossamerError(
                f"the keys {self.method.key()} gives up depend on the input; see "
                "eviction.shortened.held_bytes(cache)"
            )
        return KVBytes(dense, kept)

    def _kv_width(self, layer: int) -> int:
        """Bytes of one token's keys and values in a layer."""
        shapes = {s.role: s.shape for s in self._sites.in_block(layer)}
        site = next(s for s in self._sites.in_block(layer) if s.role.startswith("attention"))
        size = site.weight(self.model).element_size()
        if "attention.k" in shapes:
            return (shapes["attention.k"][0] + shapes["attention.v"][0]) * size
        return (shapes["attention.qkv"][0] - shapes["attention.o"][1]) * size


def attention_shape(model: nn.Module) -> str:
    """Layers and heads of a model in words: what a plan for its heads fits."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    layers = len(find_sites(model).attentions)
    return f"{layers} layers of {heads} heads, {shared} key-value heads"


def _phase_note(measured: Iterable[Kept], phase: str) -> str:
    """Density and attention mass of one phase in a sentence; empty if it was not measured."""
    rows = [row for row in measured if row.phase == phase]
    total = sum(row.total for row in rows)
    if not total:
        return ""
    density = sum(row.kept for row in rows) / total
    mass = sum(row.mass * row.total for row in rows) / total
    worst = min(rows, key=lambda row: row.mass)
    return (
        f"{phase} reads {density:.1%} of the pairs and keeps {mass:.1%} of the attention mass, "
        f"least in layer {worst.layer} ({worst.mass:.1%})"
    )
