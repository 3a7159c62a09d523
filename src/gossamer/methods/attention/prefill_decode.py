"""One method for the prompt, another for decoding, behind one name.

Most methods act on one phase only. ``FlexPrefill() + Quest()`` reads the prompt by one and decodes
by the other; each sees exactly the calls it would see alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from gossamer.core import Card, GossamerError
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout, Phase
from gossamer.methods.attention.selector import Selector
from gossamer.models import State

__all__ = ["PrefillDecode"]


@dataclass(frozen=True)
class PhaseSelector(Selector):
    """Asks one selector about prompts and another about decoding, guards of each included."""

    methods: dict[Phase, AttentionMethod]
    selectors: dict[Phase, Selector]

    # The class is asked before there are parts; the parts get what they need in any case.
    stateful: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        return any(selector.evicts for selector in self.selectors.values())

    def owns(self, call: Call, layer: int) -> bool:
        return any(selector.owns(call, layer) for selector in self.selectors.values())

    def weighable(self, call: Call, layout: Layout, layer: int) -> bool:
        part = self.selectors[layout.phase]
        return part.weighable(call, layout, layer) and not self.owns(call, layer)

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        for selector in self.selectors.values():
            if selector.owns(call, layer):
                return selector.select(call, layout, layer)
        method = self.methods[layout.phase]
        self._tell(call, layout, layer, busy=layout.phase)
        if layer < method.dense_layers or layout.end < method.min_length:
            self._tell_one(layout.phase, call, layout, layer)
            return FullIndex(layout)
        return self.selectors[layout.phase].select(call, layout, layer)

    def observe(self, call: Call, layout: Layout, layer: int) -> None:
        self._tell(call, layout, layer, busy=None)

    def after(self, call: Call, layout: Layout, layer: int) -> None:
        for selector in self.selectors.values():
            if selector.stateful:
                selector.after(call, layout, layer)

    def _tell(self, call: Call, layout: Layout, layer: int, busy: Phase | None) -> None:
        for phase in self.selectors:
            if phase != busy:
                self._tell_one(phase, call, layout, layer)

    def _tell_one(self, phase: Phase, call: Call, layout: Layout, layer: int) -> None:
        if self.selectors[phase].observes:
            self.selectors[phase].observe(call, layout, layer)

    def state(self) -> State:
        meta, tensors = {}, {}
        for phase, selector in self.selectors.items():
            own = selector.state()
            meta[phase] = own.meta
            tensors.update({f"{phase}.{name}": value for name, value in own.tensors.items()})
        return State(meta, tensors)

    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"{phase}: {note}"
            for phase, selector in self.selectors.items()
            for note in selector.notes()
        )


@dataclass(frozen=True, kw_only=True)
class PrefillDecode(AttentionMethod):
    """Two methods of this family, one per phase; usually written ``prefill + decode``.

    Parameters
    ----------
    prefill : acts on prompts; its choices in decoding, if it makes any, are not asked for.
    decode : acts on decoding.
    """

    card: ClassVar = Card(
        title="One method for the prompt, another for decoding",
        year=None,
        arxiv=None,
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores",
        score="of its parts",
        pattern="of its parts",
        budget="of its parts",
        schedule="every call",
        kernel="of its parts",
        departs="no paper: a combination",
    )
    selects: ClassVar = False
    full: ClassVar = {
        "prefill": "streaming_llm:sparsity=0",
        "decode": "streaming_llm:sparsity=0",
    }
    example: ClassVar = {"prefill": "oracle_top_k", "decode": "streaming_llm:recent=4:sink=1"}
    exempt: ClassVar = {
        "dense at sparsity 0": "it has no sparsity",
        "encoders": "the family works on causal decoders",
    }

    prefill: Any = None
    decode: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for phase in cast(tuple[Phase, ...], ("prefill", "decode")):
            part = _as_method(phase, getattr(self, phase))
            if phase not in part.phases:
                acts = " and ".join(sorted(part.phases))
                raise GossamerError(
                    f"{part.key()} acts on {acts}, not on {phase}; write prefill method + "
                    "decode method"
                )
            object.__setattr__(self, phase, part)

    def to_dict(self) -> dict[str, object]:
        values = super().to_dict()
        return {**values, "prefill": self.prefill.to_dict(), "decode": self.decode.to_dict()}

    def plan(self, model: nn.Module, data: Any, length: int) -> PhaseSelector:
        parts = self._parts(length)
        return PhaseSelector(
            parts, {phase: part.plan(model, data, length) for phase, part in parts.items()}
        )

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PhaseSelector:
        parts = self._parts(int(meta["length"]))
        selectors = {}
        for phase, part in parts.items():
            own = {
                name.removeprefix(f"{phase}."): value
                for name, value in tensors.items()
                if name.startswith(f"{phase}.")
            }
            selectors[phase] = part.replan(meta[phase], own)
        return PhaseSelector(parts, selectors)

    def _parts(self, length: int) -> dict[Phase, AttentionMethod]:
        return {
            "prefill": replace(self.prefill, length=length),
            "decode": replace(self.decode, length=length),
        }


def _as_method(phase: str, value: Any) -> AttentionMethod:
    """A method, from itself, its plain form, its text form, or the window where none is given."""
    from gossamer import methods

    if value is None:
        value = "streaming_llm"
    if isinstance(value, str):
        value = methods.parse_method(value)
    if isinstance(value, Mapping):
        given = dict(cast(Mapping[str, Any], value))
        value = methods.make(given.pop("method"), **given)
    if not isinstance(value, AttentionMethod):
        raise GossamerError(f"{phase} is {value!r}; give a method of the attention family")
    if isinstance(value, PrefillDecode):
        value = getattr(value, phase)
    return value
