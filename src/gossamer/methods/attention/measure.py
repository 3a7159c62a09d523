"""How much of a model's attention an index keeps: pairs, and probability mass.

The kept mass rho is the mean over queries of the softmax probability on the kept keys. It bounds
the error of the output: |o_sparse - o_dense| <= 2 (1 - rho) max|v| for each query.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import FullIndex, KeyIndex
from gossamer.methods.attention.layout import Layout, Phase
from gossamer.models import Tokens

__all__ = ["Kept", "Tally", "kept_mass", "walk"]

_SCORES = 1 << 25
"""Scores held at once."""

_QUERIES = 1024
"""Queries of a long prompt whose mass is measured, evenly spaced."""


class Kept(NamedTuple):
    """What one layer kept in one phase.

    Parameters
    ----------
    kept, total : pairs kept, and pairs the model itself reads. mass : mean kept probability.
    """

    layer: int
    phase: str
    kept: int
    total: int
    mass: float

    @property
    def density(self) -> float:
        """Share of the pairs that is kept."""
        return self.kept / self.total if self.total else 1.0


@torch.no_grad()
def kept_mass(call: Call, index: KeyIndex, queries: int = _QUERIES) -> Tensor:
    """Mean probability mass on the kept keys, per query head: (H,), fp32.

    Queries that see no key (padding) do not count.

    Parameters
    ----------
    queries : at most so many are looked at, evenly spaced over the call.
    """
    layout, (shared, repeat) = index.layout, call.groups
    batch, heads = call.query.shape[:2]
    query, key = call.grouped_query(), call.key.to(call.exact)
    stride = max(1, -(-layout.queries // queries))
    step = max(1, _SCORES // (batch * heads * layout.keys))
    total = torch.zeros(heads, dtype=call.exact, device=query.device)
    count = torch.zeros((), dtype=call.exact, device=query.device)
    # The last query is always among those looked at.
    first = (layout.queries - 1) % stride
    for start in range(first, layout.queries, stride * step):
        rows = slice(start, min(start + stride * step, layout.queries), stride)
        score = torch.einsum("bgrqd,bgkd->bgrqk", query[:, :, :, rows].to(call.exact), key)
        score = score * call.factor
        if call.softcap is not None:
            score = call.softcap * torch.tanh(score / call.softcap)
        seen = layout.mask(rows)
        score = score.masked_fill(~seen[:, :, None], -torch.inf)
        if call.sink_logits is not None:
            extra = call.sink_logits.to(call.exact).view(1, shared, repeat, 1, 1)
            score = torch.cat([score, extra.expand(*score.shape[:-1], 1)], dim=-1)
        share = torch.softmax(score, dim=-1).nan_to_num(0.0)[..., : layout.keys]
        # A learned sink takes part in the softmax and has no key to keep.
        share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
        kept = (share * index.head_mask(rows)).sum(-1)
        total += kept.sum((0, 3)).flatten()
        count += seen.expand(batch, -1, -1, -1).any(-1).sum()
    return (total / count.clamp_min(1)).float()


def _own_pairs(call: Call, layout: Layout) -> int:
    """Pairs the model itself reads in a call, of one head over all rows."""
    batch = call.query.shape[0]
    if layout.plain:
        first = layout.query_offset - layout.key_offset + 1
        last = first + layout.queries - 1
        # Keys do not end before the last query.
        return batch * (first + last) * layout.queries // 2
    _, own = FullIndex(layout).pairs()
    return own * (batch // len(layout.mask(slice(0, 1))))


class Tally:
    """Pairs and mass of the calls it is shown, by layer and phase."""

    def __init__(self, phases: Iterable[Phase]) -> None:
        self._phases = frozenset(phases)
        self._pairs: dict[tuple[int, str], list[int]] = {}
        self._mass: dict[tuple[int, str], float] = {}

    def add(self, layer: int, call: Call, index: KeyIndex) -> None:
        """Count one call, if its phase is one the method acts on."""
        phase = index.layout.phase
        if phase not in self._phases:
            return
        kept, total = index.pairs()
        # Indices count the heads they tell apart; layers must weigh alike, so one head's worth.
        every = _own_pairs(call, index.layout)
        kept, total = (kept * every // total if total else 0), every
        mass = 1.0 if index.whole else float(kept_mass(call, index).mean())
        pairs = self._pairs.setdefault((layer, phase), [0, 0])
        self._mass[layer, phase] = self._mass.get((layer, phase), 0.0) + mass * total
        pairs[0], pairs[1] = pairs[0] + kept, pairs[1] + total

    def kept(self) -> tuple[Kept, ...]:
        """One row per layer and phase, in order."""
        return tuple(
            Kept(layer, phase, kept, total, self._mass[layer, phase] / total if total else 1.0)
            for (layer, phase), (kept, total) in sorted(self._pairs.items())
        )


@torch.no_grad()
def walk(model: nn.Module, tokens: Tokens, decode: int = 0) -> None:
    """Run a model over tokens: all but the last ``decode`` at once, those one by one.

    Only the decoder runs, without its output layer: nobody reads the logits.
    """
    body = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
    steps = min(decode, ids.shape[1] // 2)
    prompt = ids.shape[1] - steps
    padded = not bool(mask.all())
    cache: Any = None
    edges = [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]
    for start, stop in edges:
        more = {"attention_mask": mask[:, :stop].long()} if padded else {}
        out = body(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=steps > 0, **more)
        cache = getattr(out, "past_key_values", None)
