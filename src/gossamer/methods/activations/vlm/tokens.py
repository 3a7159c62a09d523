"""Which image tokens to keep: those whose active neurons overlap most with the core.

Shapes: B rows, T tokens, F neurons.
"""

from typing import Literal

import torch
from torch import Tensor

from gossamer.core import topk_mask
from gossamer.methods.activations.core.neurons import chord_elbow, sentence_core

__all__ = ["Reference", "above_elbow", "keep_tokens", "overlap"]

Reference = Literal["core", "text", "late"]
_LATE = 5


def overlap(
    active: Tensor, real: Tensor, prunable: Tensor, keep: int, reference: Reference
) -> Tensor:
    """How many of a token's active neurons lie in the reference set of its row.

    Parameters
    ----------
    active : bool (B, T, F), positive activations.
    real : bool (B, T), not padding. prunable : bool (B, T), image tokens.
    keep : neurons in the core.
    reference : ``core``, the neurons active in most real tokens; ``text``, the same over text
        tokens; ``late``, the active neurons of the fifth-last token of the row, or of the last one
        when that is an image token.

    Returns
    -------
    float32 (B, T).
    """
    if reference == "late":
        rows = torch.arange(len(active), device=active.device)
        last = active.shape[1] - 1 - real.flip(1).int().argmax(1)
        place = (last - _LATE + 1).clamp_min(0)
        place = torch.where((prunable | ~real)[rows, place], last, place)
        core = active[rows, place]
    else:
        voters = real if reference == "core" else real & ~prunable
        votes = (active & voters[..., None]).sum(1).float()
        core = sentence_core(votes, torch.zeros_like(votes), torch.zeros_like(votes), keep)
    return (active & core[:, None]).sum(-1).float()


def above_elbow(scores: Tensor) -> Tensor:
    """The scores before the bend of their sorted curve; all of them when it does not bend.

    The bend is the point of the descending curve farthest from the chord of its ends. A point
    below the chord is the first of the low ones and goes; a point above it is the last of the
    high ones and stays. Equal scores share their fate.

    Parameters
    ----------
    scores : (n,).

    Returns
    -------
    bool (n,), at least one True for n > 0.
    """
    curve = scores.double().sort(descending=True).values
    at = chord_elbow(curve)
    if at == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    share = at / (len(curve) - 1)
    below = curve[at] < curve[0] + (curve[-1] - curve[0]) * share
    return scores > curve[at] if bool(below) else scores >= curve[at]


def keep_tokens(scores: Tensor, prunable: Tensor) -> Tensor | None:
    """Places of the tokens that stay, in order, as many in every row.

    Every row gives up as many tokens as the row that can spare the fewest: its lowest scores,
    ties keep the lower place. Tokens that are not prunable always stay.

    Parameters
    ----------
    scores : (B, T). prunable : bool (B, T).

    Returns
    -------
    int64 (B, T'), ascending, or None when nothing goes.
    """
    spare = []
    for score, mask in zip(scores, prunable, strict=True):
        chosen = above_elbow(score[mask])
        spare.append(int((~chosen).sum()))
    removed = min(spare, default=0)
    if removed == 0:
        return None
    order = scores.float().masked_fill(~prunable, torch.inf)
    kept = topk_mask(order, scores.shape[1] - removed)
    return kept.nonzero()[:, 1].view(len(scores), -1)
