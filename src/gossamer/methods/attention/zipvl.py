"""ZipVL: let the attention say how many tokens of a prompt matter, and spend only on those.

Some queries of the prompt probe every layer. The fewest tokens that hold a share of their attention
attend among each other; the others pass the layer by the residual. In the cache the chosen tokens
get more bits than the rest.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_count
from gossamer.core.scores.attention_estimate import last_query_weights, mass_count
from gossamer.core.scores.random import uniform_random
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.decoding.choose import Amount
from gossamer.methods.attention.eviction.mixed import MixedBits, mix
from gossamer.methods.attention.eviction.observe import keep_equal
from gossamer.methods.attention.eviction.shortened import why_not
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.methods.attention.subset import SubsetIndex
from gossamer.models import State

__all__ = ["ZipVL", "important_tokens", "probe_rows"]

_BITS = (1, 2, 4, 8)

_HELD = 1 << 23
"""Scores held at once: probes times keys of a long prompt would be a map of its square."""


def probe_rows(queries: int, share: float, seed: int, layer: int) -> Tensor:
    """Places of the queries that probe: half of them the latest, half by lot, ascending.

    Parameters
    ----------
    queries : of the call. share : of them that probe; at least one does.
    """
    if not queries:
        return torch.zeros(0, dtype=torch.long)
    count = min(queries, max(1, round(share * queries)))
    recent = -(-count // 2)
    earlier = queries - recent
    lot = uniform_random(torch.empty(earlier), seed=1000 * seed + layer)
    drawn = lot.argsort(stable=True)[: count - recent]
    return torch.cat([drawn.sort().values, torch.arange(earlier, queries)])


def important_tokens(mass: Tensor, probes: Tensor, gamma: float, normalized: bool) -> Tensor:
    """The tokens of every sequence that matter.

    How many: the fewest whose probed attention reaches ``gamma`` of it all. Which: those with the
    most attention per probe that could see them, so that early tokens gain nothing by being seen
    more often.

    Parameters
    ----------
    mass : (B, K), attention that all probes give each token, mean over the heads.
    probes : int64, (B, K), how many of them could see it.
    gamma : share of the mass, 0 to 1; at 1 all tokens matter. normalized : False chooses by the
        plain sums, for ablation.

    Returns
    -------
    bool, (B, K).
    """
    visible = probes > 0
    if gamma >= 1.0:
        return visible.clone()
    total = mass.sum(1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    count = mass_count(mass / total, gamma)
    return _best(mass, probes, count, normalized)


def _best(mass: Tensor, probes: Tensor, count: Tensor, normalized: bool) -> Tensor:
    """bool, (B, K): so many tokens of every sequence, none that no probe could see."""
    score = mass / probes.clamp_min(1) if normalized else mass
    return keep_equal(score[:, None], (probes > 0)[:, None], count)[:, 0]


@dataclass(frozen=True)
class ProbeSelector(Selector):
    """Chooses tokens layer by layer and, afterwards, packs the layer's cache."""

    gamma: float
    budget: Amount | None
    probes: float
    sink: int
    normalized: bool
    quantize: bool
    bits: int
    rest_bits: int
    buffer: int
    seed: int

    stateful: ClassVar[bool] = True

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        return self.quantize

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        if not layout.regular:
            return FullIndex(layout)
        chosen = self._important(call, layout, layer)
        if self.quantize:
            call.state.tensors["matters"] = chosen
        base = layout.query_offset - layout.key_offset
        asked = chosen[:, base : base + layout.queries]
        return SubsetIndex(layout, asked[:, None], chosen[:, None])

    def _important(self, call: Call, layout: Layout, layer: int) -> Tensor:
        """(B, K) tokens that attend and are read."""
        rows = _probes(layout, self.probes, self.seed, layer)
        mass, probes = _probed(call, layout, rows)
        if self.budget is None:
            chosen = important_tokens(mass, probes, self.gamma, self.normalized)
        else:
            count = self.budget.of((probes > 0).sum(1))
            chosen = _best(mass, probes, count, self.normalized)
        # A window of the model's own hides some tokens from every probe: nothing speaks
        # against them.
        position = layout.position[:, layout.key_index]
        last = position[:, : layout.end - layout.key_offset].amax(1, keepdim=True)
        ends = (position < self.sink) | (position == last)
        return chosen | ((position >= 0) & (ends | (probes == 0)))

    def after(self, call: Call, layout: Layout, layer: int) -> None:
        held, matters = _layer_of(call, layer), call.state.tensors.pop("matters", None)
        if held is None or not self.quantize:
            return
        packed = isinstance(held, MixedBits)
        if not packed and (matters is None or why_not(held) is not None):
            return
        later = held.keys.shape[2]
        if matters is None:
            if later < self.buffer:
                return
            matters = torch.ones(len(held.keys), later, dtype=torch.bool, device=held.keys.device)
        real = None
        if layout.padding is not None:
            real = layout.padding[:, layout.end - later : layout.end]
        fresh = matters[:, matters.shape[1] - later :]
        mix(held, fresh, (self.bits, self.rest_bits), real)

    def state(self) -> State:
        return State(asdict(self))

    def notes(self) -> tuple[str, ...]:
        if not self.quantize:
            return ()
        return (
            f"the cache stores chosen tokens at {self.bits} bits a channel and the others at "
            f"{self.rest_bits}, and decodes one layer at a time: memory is saved, time is not",
        )


def _layer_of(call: Call, layer: int) -> Any:
    layers = getattr(call.cache, "layers", ())
    return layers[layer] if layer < len(layers) else None


def _probes(layout: Layout, share: float, seed: int, layer: int) -> Tensor:
    """(B, P) probing queries of every row, from the call's first; -1 where a row has fewer.

    Probes are drawn among a row's real tokens, so padding changes nothing.
    """
    if layout.padding is None:
        rows = probe_rows(layout.queries, share, seed, layer)
        return rows.to(layout.device).expand(layout.batch, -1)
    drawn = []
    for real in layout.padding[:, layout.query_index]:
        place = real.nonzero()[:, 0]
        drawn.append(place[probe_rows(len(place), share, seed, layer).to(place.device)])
    return torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True, padding_value=-1)


def _probed(call: Call, layout: Layout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the probes give each token, and how many of them could see it.

    Parameters
    ----------
    rows : (B, P), the probing queries of every row; -1 for none.

    Returns
    -------
    mass : (B, K), sums over the probes, means over the heads. probes : int64, (B, K).
    """
    batch, keys = len(rows), layout.keys
    mass = torch.zeros(batch, keys, dtype=call.exact, device=call.query.device)
    probes = torch.zeros(batch, keys, dtype=torch.long, device=call.query.device)
    query = call.grouped_query()
    for some in rows.split(max(1, _HELD // (batch * max(call.groups) * keys)), dim=1):
        seen = _seen_by(layout, some)
        place = some.clamp_min(0)[:, None, None, :, None]
        asked = query.gather(3, place.expand(*query.shape[:3], -1, query.shape[4]))
        weights = last_query_weights(asked, call.key, call.factor, seen, call.softcap)
        mass += weights.sum(2).mean(1)
        probes += seen[:, 0].sum(1)
    return mass, probes


def _seen_by(layout: Layout, rows: Tensor) -> Tensor:
    """The model's own mask of some queries of every row, (B, 1, P, K)."""
    query = (rows.clamp_min(0) + layout.query_offset)[:, None, :, None]
    seen = layout.sees(query, layout.key_index.view(1, 1, 1, -1))
    return seen.expand(len(rows), 1, rows.shape[1], layout.keys) & (rows >= 0)[:, None, :, None]


@dataclass(frozen=True, kw_only=True)
class ZipVL(AttentionMethod):
    """In every layer, only the tokens that hold most of the attention attend; the cache is packed.

    Parameters
    ----------
    gamma : share of the probed attention that the attending tokens must hold, 0 to 1. How many
        tokens that takes is up to the layer and the prompt.
    sparsity : share of the tokens that pass a layer by, instead of ``gamma``, in [0, 1): the fixed
        number the paper compares with.
    probes : share of the prompt's queries that probe, half of them the latest, half by lot.
    sink : first tokens that always attend, as the last one does.
    normalized : choose by attention per probe that sees the token; False by the plain sum.
    quantize : store the cache in few bits: ``bits`` for tokens that attended, ``rest_bits`` for the
        others (1, 2, 4 or 8 each).
    buffer : decoded tokens are stored as they are and packed when there are so many.
    seed : of the probes' lot.

    Works on language models and on vision-language models, whose image tokens are tokens of the
    prompt. Prompts need no cache to gain; positions stay what they are.

    Not reproduced: on the packaged language model a share of the mass does not beat the same number
    of tokens in every layer (at 37 % of the tokens 3.89 against 3.67 nats, dense 2.30); the claim
    is on record as failed. With ``sparsity`` the number is fixed.

    Departs from the paper: details beyond the abstract are those of its predecessor ZipCache
    (probing, the quantizer) or from memory (gamma); decoded tokens are packed at ``bits`` without
    being probed; the decoder of the packed cache is plain torch, so it saves memory, not time.
    """

    card: ClassVar = Card(
        title="ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and "
        "KV Cache Compression",
        system="zipvl",
        year=2024,
        arxiv="2410.08584",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="tokens of the prompt in attention; bits of the cache",
        score="attention of probing queries, per probe that sees the token",
        pattern="tokens per layer, shared by the heads",
        budget="share of the attention mass, per layer and prompt; or sparsity over tokens",
        schedule="every prompt",
        kernel="token gather, fused attention; packed codes",
        departs="quantizer and probes as in ZipCache; decoded tokens are packed without probing; "
        "unpacking saves no time",
    )
    phases: ClassVar = frozenset({"prefill"})
    full: ClassVar = {"gamma": 1.0, "quantize": False}
    example: ClassVar = {"gamma": 0.7, "probes": 0.3, "sink": 1}
    chunked: ClassVar = (
        "every chunk chooses its own tokens, and later chunks read the packed keys of earlier ones"
    )
    peeks: ClassVar = "the latest queries of a prompt decide which tokens attend"
    exempt: ClassVar = {
        "exact sparsity": "sparsity counts tokens; of pairs among them fewer are left",
        "encoders": "the family works on causal decoders",
        "beats window": "tokens that pass a layer by read nothing, which counts as mass lost",
    }

    gamma: float = 0.975
    sparsity: float | None = None
    probes: float = 0.1
    sink: int = 4
    normalized: bool = True
    quantize: bool = True
    bits: int = 4
    rest_bits: int = 2
    buffer: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sink", self.sink, 0)
        check_count("buffer", self.buffer, 1)
        for name in ("gamma", "probes"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0.0 < value <= 1.0:
                raise GossamerError(f"{name} is {value!r}; give a share above 0, at most 1")
        for name in ("bits", "rest_bits"):
            if getattr(self, name) not in _BITS:
                raise GossamerError(f"{name} is {getattr(self, name)!r}; give 1, 2, 4 or 8")

    def plan(self, model: nn.Module, data: Any, length: int) -> ProbeSelector:
        return self._selector()

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ProbeSelector:
        return self._selector()

    def _selector(self) -> ProbeSelector:
        budget = None if self.sparsity is None else Amount(self.sparsity, None)
        return ProbeSelector(
            self.gamma,
            budget,
            self.probes,
            self.sink,
            self.normalized,
            self.quantize,
            self.bits,
            self.rest_bits,
            self.buffer,
            self.seed,
        )
