"""Exchange: drop some of the kept weights and grow as many elsewhere, as sparse training does.

The number kept never changes, in no group of the pattern. A growth score is the size of the
gradient (RigL), noise (SET), or any other; selection, ties and NaN are those of ``pattern.select``.
"""

from math import inf

import torch
from torch import Tensor

from gossamer.core.budget import Budget
from gossamer.core.errors import GossamerError
from gossamer.core.pattern import Block, Pattern, Unstructured

__all__ = ["grow", "survivors", "survivors_by_sign"]


def survivors(weight: Tensor, mask: Tensor, share: float, pattern: Pattern) -> Tensor:
    """What is left after the smallest kept weights are dropped.

    Parameters
    ----------
    weight : any shape. mask : bool, its shape; True where kept.
    share : of the kept weights (of the kept tiles, for blocks) that go; never more than there is
        room to grow elsewhere, so a dense layer loses nothing.
    pattern : weights of the whole layer compete, whatever the pattern; of blocks, whole tiles.

    Returns
    -------
    bool, the shape of ``mask``.

    Source: arXiv 1911.11134, algorithm 1.
    """
    unit = pattern.high * pattern.wide if isinstance(pattern, Block) else 1
    rule = pattern if isinstance(pattern, Block) else Unstructured("layer")
    kept, total = int(mask.sum()) // unit, mask.numel() // unit
    count = min(round(share * kept), total - kept)
    score = torch.where(mask, weight.detach().abs().float(), -1.0)
    return rule.select(score, Budget(keep=kept - count)).mask()


def survivors_by_sign(weight: Tensor, mask: Tensor, share: float) -> Tensor:
    """What is left after the kept weights closest to zero on either side are dropped.

    The share, at most what there is room to grow elsewhere, is taken of the positive weights
    (zeros among them) and of the negative ones apart.

    Source: SET, Nature Communications 9:2383, Methods.
    """
    kept = int(mask.sum())
    share = min(share, (mask.numel() - kept) / max(kept, 1))
    rule, left = Unstructured("layer"), mask.clone()
    for side in (mask & (weight >= 0), mask & (weight < 0)):
        count = int(side.sum())
        drop = round(share * count)
        score = torch.where(side, weight.detach().abs().float(), -1.0)
        left &= ~side | rule.select(score, Budget(keep=count - drop)).mask()
    return left


def grow(left: Tensor, score: Tensor, pattern: Pattern, budget: Budget) -> Tensor:
    """Fill up what survived with the best of all others; just dropped weights may come back.

    Parameters
    ----------
    left : bool, what survived. score : its shape, finite; higher means grow.
    pattern, budget : of the whole layer, survivors included; a count budget.

    Returns
    -------
    bool: the survivors and the grown.

    Raises
    ------
    GossamerError
        If a score is infinite or NaN.
    """
    if not bool(score.isfinite().all()):
        bad = score.numel() - int(score.isfinite().sum())
        raise GossamerError(
            f"{bad} of {score.numel()} growth scores are NaN or infinite; lower the learning rate, "
            "or let the gradient scaler skip such updates"
        )
    return pattern.select(score.float().masked_fill(left, inf), budget).mask()
