"""Decisions on masks, layer by layer: the first ones, pruning to a sparsity, exchanging.

Masks are returned in the parameters' layout, of the part that is here; quotas say what every layer
keeps. Of sharded parameters one at a time is gathered, and rank 0 has the last word on its mask.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING
from zlib import crc32

import torch
from torch import Tensor

from gossamer.core import GossamerError, Unstructured
from gossamer.core.exchange import grow, survivors, survivors_by_sign
from gossamer.core.scores import uniform_random
from gossamer.methods.training.sparsifier.change import Change
from gossamer.methods.training.sparsifier.compete import chosen, competing
from gossamer.methods.training.sparsifier.layers import Layer, Quota
from gossamer.methods.training.sparsifier.masks import Held

if TYPE_CHECKING:
    from gossamer.methods.training.base import SparseTraining

__all__ = ["arranged", "exchange", "first_masks", "prune_to"]

Decision = tuple[dict[str, Tensor], dict[str, Quota]]


def _number(text: str) -> int:
    return crc32(text.encode())


def first_masks(
    method: "SparseTraining",
    layers: tuple[Layer, ...],
    quotas: Mapping[str, Quota],
    held: Mapping[str, Held],
    scores: Mapping[str, Tensor] | None,
) -> Decision:
    """Masks of exactly the quota: random ones from the method's seed, or those of some scores.

    Parameters
    ----------
    scores : by layer; of a sharded parameter those of the part that is here.
    """
    if scores is None:
        return arranged(layers, held, _random(method, layers, quotas, held))

    def local(layer: Layer) -> Tensor:
        score = scores[layer.name]
        # Shards are of the parameter's own sides.
        turned = layer.transposed and held[layer.parameter].layout.sharded
        return score.T if turned else score

    if method.pattern == Unstructured("model"):
        found = competing(layers, held, local, method.initial_sparsity)
    else:
        found = chosen(layers, held, local, quotas)
    return arranged(layers, held, found)


def _random(
    method: "SparseTraining",
    layers: tuple[Layer, ...],
    quotas: Mapping[str, Quota],
    held: Mapping[str, Held],
) -> Iterator[tuple[Layer, Tensor, Quota]]:
    for layer in layers:
        quota = quotas[layer.name]
        like = torch.empty(layer.shape, device=held[layer.parameter].layout.working)
        noise = uniform_random(like, _number(f"{method.seed}:mask:{layer.name}"))
        yield layer, quota.pattern.select(noise, quota.budget).mask(), quota


def arranged(
    layers: tuple[Layer, ...],
    held: Mapping[str, Held],
    found: Iterable[tuple[Layer, Tensor, Quota]],
) -> Decision:
    """Masks of layers as masks of parameters; wholes of sharded ones only as long as needed."""
    waiting = Counter(layer.parameter for layer in layers)
    masks: dict[str, Tensor] = {}
    quotas: dict[str, Quota] = {}
    for layer, mask, quota in found:
        path, layout = layer.parameter, held[layer.parameter].layout
        if path not in masks:
            # Of stacked experts that are no layers everything is kept.
            masks[path] = torch.ones(layout.shape, dtype=torch.bool, device=layout.working)
        layer.view(masks[path]).copy_(mask)
        quotas[layer.name] = quota
        waiting[path] -= 1
        if layout.sharded and not waiting[path]:
            masks[path] = layout.agreed(masks[path])
    return masks, quotas


def prune_to(
    method: "SparseTraining",
    layers: tuple[Layer, ...],
    held: Mapping[str, Held],
    removed: Mapping[str, Tensor],
    sparsity: float,
) -> Decision:
    """Keep the largest weights; removed values, where they are remembered, compete.

    Returns
    -------
    Masks, and what every layer now keeps.
    """

    def local(layer: Layer) -> Tensor:
        one = held[layer.parameter]
        of = _itself if one.layout.sharded else layer.view
        value = of(one.trained)
        if layer.parameter in removed:
            return (value + of(removed[layer.parameter])).abs().float()
        return torch.where(of(one.mask), value.abs().float(), -1.0)

    if method.pattern == Unstructured("model"):
        found = competing(layers, held, local, sparsity)
    else:
        found = chosen(layers, held, local, method.quotas(layers, sparsity))
    return arranged(layers, held, found)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def exchange(
    layers: tuple[Layer, ...],
    held: Mapping[str, Held],
    quotas: Mapping[str, Quota],
    signal: Mapping[str, Tensor],
    change: Change,
    seed: str,
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor | None]]]:
    """Drop small weights of every layer and grow as many.

    Parameters
    ----------
    signal : parameter to the size of its gradient or correlation, where growth is by either.
    seed : of what is drawn.

    Returns
    -------
    Masks, and per parameter where weights grew with their values, None for zeros.
    """
    masks: dict[str, Tensor] = {}
    renewed: dict[str, tuple[Tensor, Tensor | None]] = {}
    for path, one in held.items():
        layout = one.layout
        mask, weight = layout.full(one.mask), layout.full(one.trained)
        size = None if change.growth == "random" else layout.full(signal[path])
        new, grown = mask.clone(), torch.zeros_like(mask)
        drawn = torch.zeros_like(weight, dtype=torch.float32) if change.grown_std else None
        for layer in (layer for layer in layers if layer.parameter == path):
            score = None if size is None else layer.view(size)
            left, kept = _exchanged(
                layer, quotas[layer.name], layer.view(mask), layer.view(weight), score, change, seed
            )
            layer.view(new).copy_(kept)
            layer.view(grown).copy_(kept & ~left)
            if drawn is not None:
                generator = torch.Generator().manual_seed(_number(f"{seed}:value:{layer.name}"))
                normal = torch.randn(layer.shape, generator=generator) * change.grown_std
                layer.view(drawn).copy_(normal)
        masks[path] = layout.agreed(new) if layout.sharded else new
        values = None if drawn is None else layout.part(drawn)
        renewed[path] = (layout.part(grown), values)
    return masks, renewed


def _exchanged(
    layer: Layer,
    quota: Quota,
    mask: Tensor,
    weight: Tensor,
    score: Tensor | None,
    change: Change,
    seed: str,
) -> tuple[Tensor, Tensor]:
    """What survives of one layer (O, I), and its new mask."""
    if change.by_sign:
        left = survivors_by_sign(weight, mask, change.exchange)
    else:
        left = survivors(weight, mask, change.exchange, quota.pattern)
    if score is None:
        score = uniform_random(mask, _number(f"{seed}:grow:{layer.name}"))
    try:
        return left, grow(left, score, quota.pattern, quota.budget)
    except GossamerError as error:
        raise GossamerError(f"{layer.name}: {error}") from None
