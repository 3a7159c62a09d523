"""One competition of all layers: the largest scores of a whole model, however it is sharded.

The largest weight of every layer is safe; among equal scores earlier layers and lower indices win.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import inf

import torch
from torch import Tensor

from gossamer.core import Budget, GossamerError, Unstructured, kept_count
from gossamer.core.rank import check_scores
from gossamer.methods.training.sparsifier.layers import Layer, Quota
from gossamer.methods.training.sparsifier.layout import sum_over_processes
from gossamer.methods.training.sparsifier.masks import Held

__all__ = ["Local", "chosen", "competing", "whole_layers"]

Local = Callable[[Layer], Tensor]
"""Scores of a layer, (O, I); where it is sharded, of its parameter's part that is here."""

_BITS, _ROUNDS = 8, 4


def whole_layers(
    layers: tuple[Layer, ...], held: Mapping[str, Held], local: Local
) -> Iterator[tuple[Layer, Tensor]]:
    """Layers with their whole scores (O, I), one parameter at a time. Collective."""
    waiting = Counter(layer.parameter for layer in layers)
    full: dict[str, Tensor] = {}
    for layer in layers:
        path, layout = layer.parameter, held[layer.parameter].layout
        if not layout.sharded:
            yield layer, local(layer)
            continue
        if path not in full:
            full[path] = layout.full(local(layer))
        yield layer, layer.view(full[path])
        waiting[path] -= 1
        if not waiting[path]:
            del full[path]


def competing(
    layers: tuple[Layer, ...], held: Mapping[str, Held], local: Local, sparsity: float
) -> Iterator[tuple[Layer, Tensor, Quota]]:
    """Layers with their masks (O, I) and what each of them keeps."""
    keep = max(kept_count(sum(layer.size for layer in layers), sparsity), len(layers))
    if not any(held[layer.parameter].layout.sharded for layer in layers):
        safe = {layer.name: local(layer).clone() for layer in layers}
        for score in safe.values():
            score[torch.unravel_index(score.argmax(), score.shape)] = inf
        found = Unstructured("model").select_model(safe, Budget(keep=keep))
        masks = ((layer, found[layer.name].mask()) for layer in layers)
    else:
        masks = _over_processes(layers, held, local, keep)
    for layer, mask in masks:
        kept = int(mask.count_nonzero())
        floored = kept == 1 and layer.size > 1
        yield layer, mask, Quota(Unstructured("layer"), kept, floored)


def chosen(
    layers: tuple[Layer, ...],
    held: Mapping[str, Held],
    local: Local,
    quotas: Mapping[str, Quota],
) -> Iterator[tuple[Layer, Tensor, Quota]]:
    """Layers with their masks (O, I), each one chosen by itself."""
    for layer, score in whole_layers(layers, held, local):
        quota = quotas[layer.name]
        yield layer, quota.pattern.select(score, quota.budget).mask(), quota


def _over_processes(
    layers: tuple[Layer, ...], held: Mapping[str, Held], local: Local, keep: int
) -> Iterator[tuple[Layer, Tensor]]:
    """The same selection without all scores in one place: first the threshold, then each layer."""
    best: list[float] = []
    for layer, score in whole_layers(layers, held, local):
        check_scores(score, f"score of {layer.name}")
        best.append(float(score.float().max()))
    _check_stacks(layers, held)
    threshold, left = _threshold(layers, held, local, best, keep - len(layers))
    for layer, score in whole_layers(layers, held, local):
        keys = _keys(score)
        safe = torch.unravel_index(score.argmax(), score.shape)
        keys[safe] = threshold - 1
        mask = keys > threshold
        ties = (keys == threshold).reshape(-1).nonzero()[:, 0][:left]
        left -= len(ties)
        flat = mask.reshape(-1)
        flat[ties] = True
        mask = flat.view(mask.shape)
        mask[safe] = True
        yield layer, mask


def _check_stacks(layers: tuple[Layer, ...], held: Mapping[str, Held]) -> None:
    for layer in layers:
        parts = [other for other in layers if other.parameter == layer.parameter]
        if sum(part.size for part in parts) < held[layer.parameter].weight.numel():
            raise GossamerError(
                f"some experts of {layer.parameter} are skipped, and its shards count as a whole "
                "where all layers compete; skip all of them or none, or choose pattern layer"
            )


def _keys(score: Tensor) -> Tensor:
    """Whole numbers from 0 in the order of float32 scores."""
    # The sum makes one number of both zeros.
    bits = (score.float() + 0.0).contiguous().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + (1 << 31)


def _threshold(
    layers: tuple[Layer, ...],
    held: Mapping[str, Held],
    local: Local,
    best: list[float],
    keep: int,
) -> tuple[int, int]:
    """The key of the last score that is kept beside the safe ones, and how many of it are.

    Digit by digit: the counts of a digit's values tell in which of them the last score lies.
    """
    device = held[layers[0].parameter].layout.working
    # The parts of a stacked parameter that is sharded are counted together.
    parts = {layer.name: layer for layer in layers}
    for layer in layers:
        if held[layer.parameter].layout.sharded:
            parts = {k: v for k, v in parts.items() if v.parameter != layer.parameter}
            parts[layer.name] = layer
    safe = _keys(torch.tensor(best))
    found, left = 0, keep
    for turn in range(_ROUNDS):
        shift = _BITS * (_ROUNDS - 1 - turn)
        counts = torch.zeros(1 << _BITS, dtype=torch.int64, device=device)
        for layer in parts.values():
            if held[layer.parameter].layout.mine:
                counts += _digits(_keys(local(layer)), found, shift).to(device)
        total = sum_over_processes(counts.tolist(), device)
        for digit, count in enumerate(_digits(safe, found, shift).tolist()):
            total[digit] -= count
        digit = (1 << _BITS) - 1
        while digit and total[digit] < left:
            left -= total[digit]
            digit -= 1
        found |= digit << shift
    return found, left


def _digits(keys: Tensor, found: int, shift: int) -> Tensor:
    """How many keys that begin as ``found`` have each value of the next digit."""
    same = keys[(keys >> (shift + _BITS)) == (found >> (shift + _BITS))]
    return torch.bincount((same >> shift) & ((1 << _BITS) - 1), minlength=1 << _BITS)
