"""The offline search: which pattern, and how much of it, serves a head best.

One prompt runs through the model with full attention. In every layer each candidate is estimated
online, as it will be in use, and the attention mass it keeps is measured against the true
weights of some rows. A head takes the candidate of most mass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.head_search.heads import Head
from gossamer.methods.attention.head_search.patterns import Online
from gossamer.methods.attention.index import FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.ranked import true_mass
from gossamer.methods.attention.selector import Selector
from gossamer.models import Progress, State

__all__ = ["PAPER", "HeadSearch", "candidates", "choose_head", "densities_and_masses"]

PAPER: tuple[Head, ...] = (
    Head("a_shape", 100, 800),
    Head("vertical_slash", 30, 800),
    Head("vertical_slash", 100, 750),
    Head("vertical_slash", 500, 700),
    Head("vertical_slash", 3500, 100),
    Head("block_sparse", 100, 1),
)
"""The paper's candidates for prompts of about 30,000 tokens, of comparable cost."""

_ROWS = 256
"""Queries whose true attention is looked at, evenly spaced."""

_SKIP = 12
"""The first 1 / 12 of the prompt does not count: there every pattern reads nearly everything."""

_ALIKE = 0.01
"""Mass within which the pattern that is cheaper to find is preferred."""

_SCORES = 1 << 25
"""Scores held at once."""


def candidates(sparsity: float | None, length: int, block_size: int) -> tuple[Head, ...]:
    """Patterns to choose from.

    Parameters
    ----------
    sparsity : share of the causal pairs to remove at ``length`` tokens; None for the paper's
        counts. Several sizes of each kind are offered: how much diagonals and blocks read is
        known only once they are found.
    """
    if sparsity is None:
        return PAPER
    budget = (1.0 - sparsity) * (length + 1) / 2
    found: list[Head] = []
    for share in (1.0, 0.85, 0.7, 0.5, 0.25):
        part = share * budget
        found.append(Head("a_shape", max(1, round(part / 9)), max(1, round(part * 8 / 9))))
        found.append(Head("block_sparse", max(1, int(part / block_size)), 1))
    for columns in (0.05, 0.25, 0.75):
        rest = (1.0 - columns) * budget
        # Neighbouring distances share blocks; scattered ones take two blocks each.
        for diagonals in (0.8 * rest, rest / 4, rest / (2 * block_size), rest / (8 * block_size)):
            found.append(
                Head("vertical_slash", max(1, int(columns * budget)), max(1, int(diagonals)))
            )
    return tuple(dict.fromkeys(found))


@torch.no_grad()
def densities_and_masses(call: Call, indexes: Sequence[KeyIndex]) -> tuple[Tensor, Tensor]:
    """What several indices keep of one call.

    Returns
    -------
    densities, masses : (candidates, G). Density is over the pairs of all sampled rows, mass the
        mean over the rows after the first twelfth.
    """
    layout, (shared, _) = indexes[0].layout, call.groups
    stride = max(1, -(-layout.queries // _ROWS))
    step = stride * max(1, _SCORES // (call.query.shape[0] * call.query.shape[1] * layout.keys))
    kept = torch.zeros(len(indexes), shared, dtype=torch.float64, device=layout.device)
    mass, own, rows_counted = torch.zeros_like(kept), 0.0, 0.0
    first = (layout.queries - 1) % stride
    for start in range(first, layout.queries, step):
        rows = slice(start, min(start + step, layout.queries), stride)
        share = true_mass(call, layout, rows).exp()
        seen = layout.mask(rows).expand(len(share), 1, -1, -1)
        at = layout.query_index[rows]
        counted = (at >= layout.query_offset + layout.queries // _SKIP) & seen.any(-1)
        own, rows_counted = own + float(seen.sum()), rows_counted + float(counted.sum())
        share = share * counted[..., None]
        for number, index in enumerate(indexes):
            mask = index.mask(rows).expand(len(share), shared, -1, -1)
            kept[number] += mask.sum((0, 2, 3))
            mass[number] += (share * mask).sum((0, 2, 3))
    return kept / max(own, 1.0), mass / max(rows_counted, 1.0)


def choose_head(offered: Sequence[Head], density: Tensor, mass: Tensor, limit: float = 1.0) -> Head:
    """The candidate of most mass among those within a density.

    Within 0.01 of the most mass the cheaper kind is taken: an A-shape needs no estimate, columns
    and diagonals need the last queries, blocks need the whole map; then the sparser.

    Parameters
    ----------
    density, mass : (candidates,). limit : on the density; if none is within it, the sparsest wins.
    """
    within = [n for n in range(len(offered)) if float(density[n]) <= limit]
    if not within:
        within = [int(density.argmin())]
    most = max(float(mass[n]) for n in within)
    alike = [n for n in within if float(mass[n]) >= most - _ALIKE]
    order = ("a_shape", "vertical_slash", "block_sparse", "dense")
    best = min(alike, key=lambda n: (order.index(offered[n].kind), float(density[n])))
    return offered[best]._replace(score=round(float(mass[best]), 4))


@dataclass(frozen=True)
class HeadSearch(Selector):
    """Chooses a pattern for every head while the prompt runs with full attention.

    Attributes
    ----------
    offered : the candidates. limit : on the density of a head.
    block_size, last_queries, sink, local : as in :class:`Online`.
    layers : of the model, for the progress. progress : told after every layer.
    found : layer to the patterns of its key-value heads, filled as layers run.
    """

    offered: tuple[Head, ...]
    limit: float
    block_size: int
    last_queries: int
    sink: int
    local: int
    layers: int = 0
    progress: Progress | None = None
    found: dict[int, tuple[Head, ...]] = field(default_factory=dict)

    def select(self, call: Call, layout: Layout, layer: int) -> FullIndex:
        online = Online(call, layout, self.block_size, self.last_queries, self.sink, self.local)
        indexes = [online.of_all(head) for head in self.offered]
        density, mass = densities_and_masses(call, indexes)
        self.found[layer] = tuple(
            choose_head(self.offered, density[:, head], mass[:, head], self.limit)
            for head in range(density.shape[1])
        )
        if self.progress is not None:
            self.progress(len(self.found), self.layers, f"patterns of layer {layer}")
        return FullIndex(layout)

    def state(self) -> State:
        return State({})
