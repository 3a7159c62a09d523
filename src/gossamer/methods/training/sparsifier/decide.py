"""Decisions on masks, layer by layer: the first ones, pruning to a sparsity, exchanging.

Masks are returned in the parameters' layout; quotas say what every layer keeps.
"""

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING
from zlib import crc32

import torch
from torch import Tensor

from gossamer.core import Budget, GossamerError, Unstructured, kept_count
from gossamer.core.exchange import grow, survivors, survivors_by_sign
from gossamer.core.scores import uniform_random
from gossamer.methods.training.sparsifier.change import Change
from gossamer.methods.training.sparsifier.layers import Layer, Quota
from gossamer.methods.training.sparsifier.masks import Held

if TYPE_CHECKING:
    from gossamer.methods.training.base import SparseTraining

__all__ = ["exchange", "first_masks", "prune_to"]


def _number(text: str) -> int:
    return crc32(text.encode())


def _fresh(held: Mapping[str, Held]) -> dict[str, Tensor]:
    # Of stacked experts that are no layers everything is kept.
    return {path: torch.ones_like(one.mask) for path, one in held.items()}


def first_masks(
    method: "SparseTraining",
    layers: tuple[Layer, ...],
    quotas: Mapping[str, Quota],
    held: Mapping[str, Held],
    scores: Mapping[str, Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, Quota]]:
    """Masks of exactly the quota: random ones from the method's seed, or those of some scores."""
    if scores is None:
        scores = {
            layer.name: uniform_random(
                layer.view(held[layer.parameter].mask),
                _number(f"{method.seed}:mask:{layer.name}"),
            )
            for layer in layers
        }
    elif method.pattern == Unstructured("model"):
        return _arranged(layers, held, *_compete(layers, scores, method.initial_sparsity))
    chosen = {
        name: quota.pattern.select(scores[name], quota.budget).mask()
        for name, quota in quotas.items()
    }
    return _arranged(layers, held, chosen, quotas)


def _arranged(
    layers: tuple[Layer, ...],
    held: Mapping[str, Held],
    chosen: Mapping[str, Tensor],
    quotas: Mapping[str, Quota],
) -> tuple[dict[str, Tensor], dict[str, Quota]]:
    """Masks of layers as masks of parameters."""
    masks = _fresh(held)
    for layer in layers:
        layer.view(masks[layer.parameter]).copy_(chosen[layer.name])
    return masks, dict(quotas)


def prune_to(
    method: "SparseTraining",
    layers: tuple[Layer, ...],
    held: Mapping[str, Held],
    removed: Mapping[str, Tensor],
    sparsity: float,
) -> tuple[dict[str, Tensor], dict[str, Quota]]:
    """Keep the largest weights; removed values, where they are remembered, compete.

    Returns
    -------
    Masks, and what every layer now keeps.
    """
    scores: dict[str, Tensor] = {}
    for layer in layers:
        one = held[layer.parameter]
        value = one.master.detach()
        if layer.parameter in removed:
            score = (value + removed[layer.parameter]).abs().float()
        else:
            score = torch.where(one.mask, value.abs().float(), -1.0)
        scores[layer.name] = layer.view(score)
    if method.pattern == Unstructured("model"):
        chosen, quotas = _compete(layers, scores, sparsity)
    else:
        quotas = method.quotas(layers, sparsity)
        chosen = {
            layer.name: quotas[layer.name]
            .pattern.select(scores[layer.name], quotas[layer.name].budget)
            .mask()
            for layer in layers
        }
    return _arranged(layers, held, chosen, quotas)


def _compete(
    layers: tuple[Layer, ...], scores: Mapping[str, Tensor], sparsity: float
) -> tuple[dict[str, Tensor], dict[str, Quota]]:
    """One competition over all layers, in which the largest weight of each one is safe."""
    keep = max(kept_count(sum(layer.size for layer in layers), sparsity), len(layers))
    safe = {name: score.clone() for name, score in scores.items()}
    for score in safe.values():
        best = torch.unravel_index(score.argmax(), score.shape)
        score[best] = inf
    found = Unstructured("model").select_model(safe, Budget(keep=keep))
    quotas: dict[str, Quota] = {}
    for layer in layers:
        kept = found[layer.name].kept
        floored = kept == 1 and layer.size > 1
        quotas[layer.name] = Quota(Unstructured("layer"), kept, floored)
    return {name: selection.mask() for name, selection in found.items()}, quotas


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
    masks = {path: one.mask.clone() for path, one in held.items()}
    grown = {path: torch.zeros_like(one.mask) for path, one in held.items()}
    drawn: dict[str, Tensor | None] = {
        path: torch.zeros_like(one.master, dtype=torch.float32) if change.grown_std else None
        for path, one in held.items()
    }
    for layer in layers:
        one, quota = held[layer.parameter], quotas[layer.name]
        mask, weight = layer.view(one.mask), layer.view(one.master.detach())
        if change.by_sign:
            left = survivors_by_sign(weight, mask, change.exchange)
        else:
            left = survivors(weight, mask, change.exchange, quota.pattern)
        if change.growth == "random":
            score = uniform_random(mask, _number(f"{seed}:grow:{layer.name}"))
        else:
            score = layer.view(signal[layer.parameter])
        try:
            new = grow(left, score, quota.pattern, quota.budget)
        except GossamerError as error:
            raise GossamerError(f"{layer.name}: {error}") from None
        layer.view(masks[layer.parameter]).copy_(new)
        layer.view(grown[layer.parameter]).copy_(new & ~left)
        values = drawn[layer.parameter]
        if values is not None:
            generator = torch.Generator().manual_seed(_number(f"{seed}:value:{layer.name}"))
            normal = torch.randn(tuple(mask.shape), generator=generator) * change.grown_std
            layer.view(values).copy_(normal)
    return masks, {path: (grown[path], drawn[path]) for path in held}
