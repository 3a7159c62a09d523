"""Folds: which training rows judge a probe, and the measure they judge by.

Shapes: N = training rows, F = folds.
"""

from collections.abc import Sequence

import torch
from scipy.stats import rankdata
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["auc", "balanced", "folds", "validation_auc"]

_PAIRS, _FOLDED = 12, 128
_FOLDS = 6
_SHARE, _MOST = 0.2, 100


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: how often a positive outranks a negative, ties counted half.

    Raises
    ------
    GossamerError
        If one of the classes is empty.
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise GossamerError(
            f"{positives} positive and {negatives} negative rows have no ROC curve; give both"
        )
    ranks = torch.from_numpy(rankdata(scores.numpy()))
    lead = float(ranks[labels].sum()) - positives * (positives + 1) / 2
    return lead / (positives * negatives)


def folds(labels: Tensor, seed: int) -> Tensor:
    """(F, N) bool: the rows each fold holds out, both classes in every fold.

    Up to 12 rows every pair of a positive and a negative is a fold; below 128 rows there are 6
    folds, fewer where a class is smaller; from there one fold of 20 %, at most 100 rows.

    Raises
    ------
    GossamerError
        If a class has no row. One with a single row makes no fold: (0, N).
    """
    places = [labels.nonzero()[:, 0], (~labels).nonzero()[:, 0]]
    few = min(len(part) for part in places)
    if not few:
        raise GossamerError("training rows of one class only; a probe needs both")
    total = len(labels)
    if few == 1:
        return torch.zeros(0, total, dtype=torch.bool)
    if total <= _PAIRS:
        held = torch.zeros(len(places[0]), len(places[1]), total, dtype=torch.bool)
        for i, one in enumerate(places[0]):
            held[i, :, one] = True
        for j, other in enumerate(places[1]):
            held[:, j, other] = True
        return held.flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    mixed = [part[torch.randperm(len(part), generator=generator)] for part in places]
    if total < _FOLDED:
        count = min(_FOLDS, few)
        held = torch.zeros(count, total, dtype=torch.bool)
        for part in mixed:
            held[torch.arange(len(part)) % count, part] = True
        return held
    held = torch.zeros(1, total, dtype=torch.bool)
    share = min(_SHARE, _MOST / total)
    for part in mixed:
        held[0, part[: max(1, round(share * len(part)))]] = True
    return held


def balanced(labels: Tensor, held: Tensor) -> Tensor:
    """(F, N) weights: 0 where held out, and elsewhere such that both classes weigh alike."""
    used = (~held).double()
    positives = (used * labels).sum(1, keepdim=True)
    total = used.sum(1, keepdim=True)
    own = torch.where(labels, positives, total - positives)
    return used * total / (2 * own.clamp_min(1))


def validation_auc(scores: Sequence[Tensor], labels: Tensor, held: Tensor) -> float:
    """Mean over folds of the AUC of the rows held out; 0.5 without folds."""
    found = [auc(s[h], labels[h]) for s, h in zip(scores, held, strict=True)]
    return sum(found) / len(found) if found else 0.5
