"""Emotion circuits: few neurons and heads carry a feeling; nudge those and the model shows it.

Directions of each feeling say which neurons and heads write it, a causal test says which layers
matter, and the edit adds to the chosen units what the feeling changes in them.
Shapes: N = texts, D = width of the residual stream, I = hidden units, H = heads, C = columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Site, check_count
from gossamer.methods.control.base import Affine, Edit, Intervention, Plan, SteeringMethod
from gossamer.methods.features.editing import gathered
from gossamer.models import Progress, Tokens, find_sites
from gossamer.models.labelled import Labelled

__all__ = ["Circuit", "EmotionCircuits", "directions", "find_circuit", "shares"]

_PROBES = (1.0, 2.0, 4.0)
_STABLE = (0.75, 0.9)


def directions(rows: Tensor, feeling: Tensor, group: Tensor) -> Tensor:
    """What each feeling changes, apart from what the texts are about: (feelings, C).

    Inside each group the mean over feelings is taken off each feeling's mean; groups are averaged,
    and the mean over feelings taken off again. Groups that lack a feeling are left out.

    Parameters
    ----------
    rows : (N, C). feeling, group : int64 (N,).

    Raises
    ------
    GossamerError
        If no group shows every feeling.
    """
    count = int(feeling.max()) + 1
    kept: list[Tensor] = []
    for g in group.unique():
        parts = [rows[(group == g) & (feeling == e)] for e in range(count)]
        if all(len(part) for part in parts):
            means = torch.stack([part.mean(0) for part in parts])
            kept.append(means - means.mean(0))
    if not kept:
        raise GossamerError(
            f"no group has texts of all {count} values; give every scenario in each of them, or "
            "leave the attribute 'group' out"
        )
    found = torch.stack(kept).mean(0)
    return found - found.mean(0)


def shares(importance: Tensor, budget: int, room: int) -> list[int]:
    """Share a budget over layers in proportion to their importance; none gets more than its room.

    Layers of negative importance get nothing unless all the others are full.
    """
    weight = importance.double().clamp_min(0) + 1e-12
    got = [0] * len(weight)
    for _ in range(min(budget, room * len(got))):
        # Highest averages: the next unit goes where a unit weighs most.
        worth = [float(w) / (g + 1) if g < room else -1.0 for w, g in zip(weight, got, strict=True)]
        got[worth.index(max(worth))] += 1
    return got


class _Part(NamedTuple):
    """One sublayer: its last matrix, and how its input columns fall into components."""

    site: Site
    components: int
    columns: int


@dataclass(frozen=True, eq=False)
class Circuit:
    """Chosen components and what the feeling changes in them.

    Parameters
    ----------
    units : path of a sublayer's last matrix to the columns of its input, int64.
    change : path to (C,), the change of every column, chosen or not.
    columns : path to the columns of one component: 1 for neurons, a head's width for heads.
    neurons, heads : how many components were chosen, and of how many, each a pair.
    """

    units: Mapping[str, Tensor]
    change: Mapping[str, Tensor]
    columns: Mapping[str, int]
    neurons: tuple[int, int]
    heads: tuple[int, int]

    def random(self, seed: int) -> "Circuit":
        """As many neurons and heads drawn at random, with their own change: the baseline."""
        generator = torch.Generator().manual_seed(seed)
        units: dict[str, Tensor] = {}
        for wide, (few, _) in ((False, self.neurons), (True, self.heads)):
            paths = [path for path, columns in self.columns.items() if (columns > 1) == wide]
            rooms = [len(self.change[path]) // self.columns[path] for path in paths]
            drawn = torch.randperm(sum(rooms), generator=generator)[:few]
            for i, path in enumerate(paths):
                own = drawn - sum(rooms[:i])
                own = own[(own >= 0) & (own < rooms[i])].sort().values
                units[path] = _columns(own, self.columns[path])
        return replace(self, units=units)

    def edits(self) -> tuple[Edit, ...]:
        """Add the change to the chosen columns."""
        return tuple(
            Edit(f"{path}:in", Affine.added(self.change[path][units]), units)
            for path, units in self.units.items()
            if len(units)
        )

    def ablation(self, positions: str = "all") -> Intervention:
        """Set the chosen columns to zero."""
        cut = [
            Edit(f"{path}:in", Affine.scaled(torch.zeros(len(units))), units)
            for path, units in self.units.items()
            if len(units)
        ]
        return Intervention(tuple(cut), 1.0, positions)


def _parts(model: nn.Module) -> tuple[list[_Part], list[_Part]]:
    """MLP and attention sublayers."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    mlp: list[_Part] = []
    attention: list[_Part] = []
    for site in find_sites(model).select(("mlp.down", "attention.o")):
        if site.expert is None and site.role == "mlp.down":
            mlp.append(_Part(site, site.shape[1], 1))
        elif site.role == "attention.o":
            heads = config.num_attention_heads
            attention.append(_Part(site, heads, site.shape[1] // heads))
    if not mlp or not attention:
        raise GossamerError(
            f"{type(model).__name__} has no MLP of its own in a block; circuits need one"
        )
    return mlp, attention


class _Texts(NamedTuple):
    tokens: Tokens
    feeling: Tensor
    group: Tensor
    target: int

    def change(self, rows: Tensor) -> Tensor:
        """(C,), what the target changes."""
        return directions(rows, self.feeling.to(rows.device), self.group.to(rows.device))[
            self.target
        ]


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp_min(1e-12)


def _importance(
    model: nn.Module, texts: _Texts, parts: list[_Part], toward: Mapping[str, Tensor]
) -> Tensor:
    """Change of the last block's score per unit of push at each sublayer's output."""
    blocks = find_sites(model).blocks
    last = blocks[-1]
    low, high = (round(share * len(blocks)) for share in _STABLE)
    stable = blocks[low : max(high, low + 1)] or blocks[-1:]
    seen = gathered(model, texts.tokens, tuple(dict.fromkeys((*stable, last))))
    found = [_unit(texts.change(seen[path])) for path in stable]
    reference = _unit(
        sum((v * torch.sign(v @ found[0]) for v in found), torch.zeros_like(found[0]))
    )
    before = float((seen[last] @ reference).mean())
    paths = tuple(part.site.module for part in parts)
    sizes = gathered(model, texts.tokens, paths)
    gains: list[float] = []
    for path in paths:
        size = float(sizes[path].square().mean(1).sqrt().mean())
        gain = 0.0
        for alpha in _PROBES:
            push = Intervention(
                (Edit(path, Affine.added(alpha * size * toward[path])),), 1.0, "last"
            )
            with push.on(model):
                after = gathered(model, texts.tokens, (last,))[last]
            gain += (float((after @ reference).mean()) - before) / (alpha * size)
        gains.append(gain / len(_PROBES))
    return torch.tensor(gains)


def find_circuit(
    model: nn.Module,
    data: Labelled,
    attribute: str,
    target: str,
    *,
    neurons: int | None = None,
    heads: int | None = None,
) -> Circuit:
    """Neurons and heads that write a feeling, on the texts' last tokens.

    Parameters
    ----------
    data : every text shows one value of the attribute; an attribute ``group`` tells which texts
        are alike but for it.
    neurons, heads : how many in all; None: 2 % of the neurons, 10 % of the heads.

    Raises
    ------
    GossamerError
        For more components than there are, or texts that cannot be contrasted.
    """
    feeling = data.codes(attribute)
    group = data.attributes.get("group", torch.zeros_like(feeling))
    # Numbers without gaps: a value that no text has is no feeling to contrast with.
    known, feeling = feeling.unique(return_inverse=True)
    wanted = int((known == data.number(attribute, target)).nonzero())
    texts = _Texts(data.tokens, feeling, group, wanted)
    mlp, attention = _parts(model)
    total = sum(part.components for part in mlp), sum(part.components for part in attention)
    few = (
        max(1, int(0.02 * total[0])) if neurons is None else neurons,
        max(1, int(0.1 * total[1])) if heads is None else heads,
    )
    for name, count, most in zip(("neurons", "heads"), few, total, strict=True):
        if count > most:
            raise GossamerError(f"{name} is {count}; the model has {most}")
    both = [*mlp, *attention]
    outputs = gathered(model, texts.tokens, tuple(part.site.module for part in both))
    toward = {path: _unit(texts.change(rows)) for path, rows in outputs.items()}
    inputs = gathered(model, texts.tokens, tuple(f"{part.site.module}:in" for part in both))
    gains = _importance(model, texts, both, toward)
    units: dict[str, Tensor] = {}
    for parts, gain, count in (
        (mlp, gains[: len(mlp)], few[0]),
        (attention, gains[len(mlp) :], few[1]),
    ):
        for part, many in zip(parts, shares(gain, count, parts[0].components), strict=True):
            path = part.site.module
            units[path] = _written(model, part, inputs[f"{path}:in"], toward[path], texts, many)
    change = {part.site.module: texts.change(inputs[f"{part.site.module}:in"]) for part in both}
    return Circuit(
        {path: chosen.cpu() for path, chosen in units.items()},
        {path: value.cpu() for path, value in change.items()},
        {part.site.module: part.columns for part in both},
        (few[0], total[0]),
        (few[1], total[1]),
    )


def _written(
    model: nn.Module, part: _Part, inputs: Tensor, toward: Tensor, texts: _Texts, many: int
) -> Tensor:
    """Columns of the components that write most along a direction on the target's texts."""
    # A sublayer's last matrix is linear, so what zeroing a head takes away is what it wrote.
    wrote = inputs * (toward @ part.site.weight(model).float())
    mine = wrote[(texts.feeling == texts.target).to(wrote.device)].mean(0)
    score = mine.view(part.components, part.columns).sum(1)
    best = score.argsort(descending=True, stable=True)[:many].sort().values
    return _columns(best, part.columns)


def _columns(components: Tensor, columns: int) -> Tensor:
    """Columns of components, ``columns`` side by side for each."""
    own = torch.arange(columns, device=components.device)
    return (components[:, None] * columns + own).flatten()


@dataclass(frozen=True, kw_only=True)
class EmotionCircuits(SteeringMethod):
    """Make a model show a feeling by editing the few neurons and heads that carry it.

    Give texts of several feelings, ending where the feeling is about to show; an attribute
    ``group`` marks texts that are alike but for the feeling.

    Parameters
    ----------
    neurons, heads : components edited in all; None: 2 % of neurons, 10 % of heads. The paper
        takes 392 neurons and 168 heads of a model of 3 billion parameters (as re-implemented
        by others).
    strength : share of the feeling's mean change that is added; above about 1 texts degenerate.

    Source: arXiv 2510.11328. Departs from the paper: the reference direction is that of the
    blocks between 75 % and 90 % of the depth, whatever the model; texts are given, not elicited
    and judged.
    """

    card: ClassVar[Card] = Card(
        title='Do LLMs "Feel"? Emotion Circuits Discovery and Control',
        year=2025,
        arxiv="2510.11328",
        system="emotion_circuits",
        family="control",
        when="inference",
        start="dense",
        masks="static",
        site="inputs of the MLP's and the attention's last matrix",
        score="what a component writes along the feeling's direction",
        pattern="neurons and heads",
        budget="components shared over layers by their causal importance",
        update="none",
        kernel="fused add",
        departs="texts are given, not elicited and judged; reference layers by relative depth",
    )
    example: ClassVar[Mapping[str, Any]] = {"target": "1"}

    strength: float = 0.8
    positions: str = "last"
    neurons: int | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("neurons", "heads"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 0)

    def plan(self, model: nn.Module, data: Labelled, progress: Progress | None = None) -> Plan:
        assert self.target is not None
        found = find_circuit(
            model, data, self.attribute, self.target, neurons=self.neurons, heads=self.heads
        )
        (n, neurons), (h, heads) = found.neurons, found.heads
        note = f"circuit of {self.target!r}: {n} of {neurons} neurons, {h} of {heads} heads"
        return Plan(found.edits(), (note,))
