"""Recursive attribution: from a latent back through sources, stream latents and earlier blocks.

Each hop asks the exact question of :mod:`.direct` or :mod:`.stream` and follows the largest part.
Shapes: H = heads, E = width of a head, D = hidden width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, check_count
from gossamer.methods.features.attribution.direct import attribute, direct, readers
from gossamer.methods.features.attribution.stream import components, split_source
from gossamer.methods.features.attribution.view import AttentionView, views
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.models import find_sites

__all__ = ["Hop", "trace"]


@dataclass(frozen=True)
class Hop:
    """One step back.

    Parameters
    ----------
    block, head, at, source : the head that moved something, from which token to which; the head
        is the one that gave most of what came from the source.
    given : what all heads of the block moved from that source to the reading.
    share : that, over the summed sizes of what all sources gave.
    latent : stream latent at the source that gave most of it; None without a dictionary there.
    part : what it gave.
    """

    block: int
    head: int
    at: int
    source: int
    given: float
    share: float
    latent: int | None = None
    part: float = 0.0

    def __str__(self) -> str:
        said = f"block {self.block} head {self.head}: token {self.source} to token {self.at}, "
        said += f"{self.given:+.3f} ({self.share:.0%} of what all tokens gave)"
        if self.latent is not None:
            said += f", of which stream latent {self.latent} {self.part:+.3f}"
        return said


@torch.no_grad()
def trace(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    made: Dictionary,
    block: int,
    *,
    latent: int,
    at: int,
    streams: Mapping[int, Dictionary],
    row: int = 0,
    depth: int = 3,
) -> tuple[Hop, ...]:
    """Follow an attention-output latent back to where it comes from.

    The source that gives the latent most is split over a dictionary of the stream there; the
    largest of those latents is read in the outputs of all earlier attentions at that token; the
    source that gives most of any of them is the next hop. A trace ends at ``depth`` hops, where no
    dictionary of the stream is given, where the embedding or an MLP gives more than any
    attention, or at the first block.

    Parameters
    ----------
    inputs : keyword arguments of the model. row : the window.
    made : dictionary of the attention output of ``block``. at : token where the latent speaks.
    streams : block to a dictionary of what enters it.

    Raises
    ------
    GossamerError
        As :func:`direct`, :func:`split_source` and :func:`components`.
    """
    check_count("depth", depth, 1)
    seen = views(model, inputs, range(block + 1))
    view, window = seen[block], torch.tensor([row])
    length, heads = view.maps.shape[2], view.maps.shape[1]
    if not 0 <= at < length or not 0 <= row < len(view.maps):
        raise GossamerError(f"token {at} of window {row} is not there; windows hold {length}")
    found = direct(view, made, torch.tensor([latent]), window, torch.tensor([at]))
    hop, reading = _hop(view, found.parts[0], at), readers(made, torch.tensor([latent]), heads)[0]
    hops: list[Hop] = []
    while True:
        stream = streams.get(hop.block)
        if stream is None:
            return (*hops, hop)
        split = split_source(
            model, seen[hop.block], reading, stream, row=row, at=hop.at, source=hop.source
        )
        if not len(split.parts):
            return (*hops, hop)
        best = int(split.parts.argmax())
        inner = int(split.latents[best])
        hops.append(_with(hop, inner, float(split.parts[best])))
        if len(hops) == depth:
            return tuple(hops)
        step = _back(model, inputs, seen, stream.W_enc[:, inner], hop, row)
        if step is None:
            return tuple(hops)
        hop, reading = step


def _with(hop: Hop, latent: int, part: float) -> Hop:
    return Hop(
        hop.block, hop.head, hop.at, hop.source, hop.given, hop.share, latent=latent, part=part
    )


def _hop(view: AttentionView, parts: Tensor, at: int) -> Hop:
    """The largest source of (H, S) parts."""
    by_source = parts.sum(0)
    source = int(by_source.argmax())
    size = float(by_source.abs().sum()) or 1.0
    head, given = int(parts[:, source].argmax()), float(by_source[source])
    return Hop(view.block, head, at, source, given, given / size)


def _back(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    seen: Mapping[int, AttentionView],
    direction: Tensor,
    hop: Hop,
    row: int,
) -> tuple[Hop, Tensor] | None:
    """The earlier attention that wrote most of a direction (D,) at the hop's source, or None."""
    if hop.block == 0:
        return None
    added = components(model, inputs, hop.block)
    gave = {name: float(part[row, hop.source] @ direction) for name, part in added.items()}
    most = max(gave, key=lambda name: gave[name])
    kind, _, number = most.partition(" ")
    if kind != "attention" or gave[most] <= 0:
        return None
    block = int(number)
    (site,) = find_sites(model).select("attention.o", (block,))
    heads = seen[block].maps.shape[1]
    reading = (direction @ site.weight(model)).unflatten(0, (heads, -1))
    at = torch.tensor([hop.source])
    parts = attribute(seen[block], reading[None], torch.tensor([row]), at)[0]
    return _hop(seen[block], parts, hop.source), reading
