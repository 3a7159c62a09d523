"""Attention that skips tiles, by definition: a loop over tiles, in float64.

Shapes: B = batch, H = heads, G = key-value heads, Q = queries, K = keys, M = queries of a tile,
N = keys of a tile, D, E = head widths of queries and values.
"""

import math

import torch
from torch import Tensor

__all__ = ["skip_decode_reference", "skip_reference"]


def _score(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    score = query @ key.transpose(-1, -2) * scale
    return score if softcap is None else softcap * torch.tanh(score / softcap)


class _Sum:
    """The online softmax of a tile of queries (m, D) over tiles of keys."""

    def __init__(self, rows: int, width: int, like: Tensor) -> None:
        self.top = torch.full((rows,), -torch.inf, dtype=torch.float64, device=like.device)
        self.total = torch.zeros_like(self.top)
        self.acc = torch.zeros(rows, width, dtype=torch.float64, device=like.device)

    def add(self, score: Tensor, value: Tensor) -> None:
        new = torch.maximum(self.top, score.amax(1))
        safe = new.masked_fill(new == -torch.inf, 0.0)
        weight = (score - safe[:, None]).exp()
        shrink = (self.top - safe).exp()
        self.total = self.total * shrink + weight.sum(1)
        self.acc = self.acc * shrink[:, None] + weight @ value
        self.top = new


def _cut(threshold: float) -> float:
    return math.log(threshold) if threshold > 0 else -math.inf


def skip_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float,
    *,
    scale: float | None = None,
    query_offset: int = 0,
    first: Tensor | None = None,
    softcap: float | None = None,
    tile: tuple[int, int] = (128, 128),
) -> tuple[Tensor, Tensor]:
    """The definition of ``skip_softmax``, whose arguments it takes."""
    (batch, heads, queries, width), keys = query.shape, key.shape[2]
    factor, cut = width**-0.5 if scale is None else scale, _cut(threshold)
    (high, wide), repeat = tile, heads // key.shape[1]
    place = torch.arange(keys, device=key.device)
    out = query.new_zeros(batch, heads, queries, value.shape[3])
    count = torch.zeros(batch, heads, -(-queries // high), 2, dtype=torch.int32, device=key.device)
    for b in range(batch):
        low = 0 if first is None else int(first[b])
        for h in range(heads):
            one, two = key[b, h // repeat].double(), value[b, h // repeat].double()
            for n, start in enumerate(range(0, queries, high)):
                rows = query[b, h, start : start + high].double()
                position = query_offset + start + torch.arange(len(rows), device=key.device)
                begin = low // wide
                whole = max((query_offset + start + 1) // wide, begin)
                last = min(query_offset + start + len(rows), keys)
                end = max(-(-last // wide), whole)
                order = [begin] if whole > begin else []
                order += [*range(whole, end), *range(begin + 1, whole)]
                sums = _Sum(len(rows), value.shape[3], out)
                must = len(order) - max(0, whole - begin - 1)
                for turn, at in enumerate(order):
                    keep = slice(at * wide, at * wide + wide)
                    own = place[keep]
                    score = _score(rows, one[keep], factor, softcap)
                    seen = (own <= position[:, None]) & (own >= low)
                    score = score.masked_fill(~seen, -torch.inf)
                    apart = score.amax(1) - sums.top.clamp_min(-1e30)
                    if turn >= must and bool((apart < cut).all()):
                        count[b, h, n, 0] += 1
                        continue
                    sums.add(score, two[keep])
                count[b, h, n, 1] = end - begin
                total = torch.where(sums.total > 0, sums.total, 1.0)
                out[b, h, start : start + high] = (sums.acc / total[:, None]).to(out.dtype)
    return out, count


def skip_decode_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float,
    *,
    scale: float | None = None,
    first: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tile: int = 64,
    splits: int = 1,
) -> tuple[Tensor, Tensor]:
    """The definition of ``skip_softmax_decode``: every split's largest score is its own."""
    (batch, heads, _, width), (_, shared, keys, _) = query.shape, key.shape
    factor, cut = width**-0.5 if scale is None else scale, _cut(threshold)
    repeat = heads // shared
    place = torch.arange(keys, device=key.device)
    out = query.new_zeros(batch, heads, 1, value.shape[3])
    count = torch.zeros(batch, shared, splits, 2, dtype=torch.int32, device=key.device)
    for b in range(batch):
        low = 0 if first is None else int(first[b])
        begin, end = low // tile, -(-keys // tile)
        each = -(-(end - begin) // splits)
        for g in range(shared):
            rows = query[b, g * repeat : (g + 1) * repeat, 0].double()
            one, two = key[b, g].double(), value[b, g].double()

            def scored(at: int, own: Tensor = rows, keys: Tensor = one, low: int = low) -> Tensor:
                keep = slice(at * tile, at * tile + tile)
                score = _score(own, keys[keep], factor, softcap)
                return score.masked_fill(place[keep] < low, -torch.inf)

            seen = torch.maximum(scored(begin).amax(1), scored(end - 1).amax(1))
            parts = []
            for split in range(splits):
                sums = _Sum(repeat, value.shape[3], out)
                for at in range(begin + split * each, min(begin + (split + 1) * each, end)):
                    score = scored(at)
                    count[b, g, split, 1] += 1
                    apart = score.amax(1) - torch.maximum(seen, sums.top)
                    if bool((apart < cut).all()):
                        count[b, g, split, 0] += 1
                        continue
                    sums.add(score, two[at * tile : at * tile + tile])
                parts.append(sums)
            top = torch.stack([s.top for s in parts])
            extra = None
            if sinks is not None:
                extra = sinks[g * repeat : (g + 1) * repeat].double()
                top = torch.cat([top, extra[None]])
            most = top.amax(0).clamp_min(-1e30)
            shrink = [(s.top - most).exp() for s in parts]
            total = sum(s.total * w for s, w in zip(parts, shrink, strict=True))
            if extra is not None:
                total = total + (extra - most).exp()
            acc = sum(s.acc * w[:, None] for s, w in zip(parts, shrink, strict=True))
            assert isinstance(total, Tensor)
            assert isinstance(acc, Tensor)
            found = acc / torch.where(total > 0, total, 1.0)[:, None]
            out[b, g * repeat : (g + 1) * repeat, 0] = found.to(out.dtype)
    return out, count
