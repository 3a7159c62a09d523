"""Probes: what a linear reader that is told the labels finds of each concept.

They are the ceiling for dictionaries, which are told nothing.
Shapes: N = rows, D = width, C = concepts, P = pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from gossamer.core import GossamerError

__all__ = ["OffsetProduct", "offset_product", "probes"]


def probes(rows: Tensor, labels: Tensor, *, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logistic probes of binary concepts: weights (C, D) and biases (C,).

    Parameters
    ----------
    rows : (N, D). labels : bool (N, C), or int where -1 marks rows that say nothing of a concept.
    penalty : of the squared weights, on rows scaled to variance 1 a channel, above 0.

    Raises
    ------
    GossamerError
        If a concept has rows of one label only.
    """
    if labels.dim() != 2 or len(labels) != len(rows):
        raise GossamerError(f"labels are {tuple(labels.shape)}; give ({len(rows)}, concepts)")
    x = rows.detach().double().cpu()
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-12)
    scaled = ((x - mean) / scale).numpy()
    weights, biases = [], []
    for i, label in enumerate(labels.long().cpu().unbind(1)):
        told = (label >= 0).numpy()
        wanted = label.numpy()[told]
        if len(set(wanted.tolist())) != 2:
            raise GossamerError(f"concept {i} has one label only; give rows of both")
        fit = LogisticRegression(C=1 / penalty, max_iter=1000).fit(scaled[told], wanted)
        weight = torch.from_numpy(fit.coef_[0]) / scale
        weights.append(weight)
        biases.append(float(fit.intercept_[0]) - weight @ mean)
    return torch.stack(weights).float(), torch.stack([torch.as_tensor(b) for b in biases]).float()


class OffsetProduct(NamedTuple):
    """Probes times counterfactual offsets.

    Parameters
    ----------
    product : (C, C), row i divided by the size of its own entry (i, i).
    positive : share of concepts whose own entry is positive, as an identity's is.
    off_diagonal : mean |entry| off the diagonal; 0 for an identity.
    cosine, cosine_off : mean cosine of a probe with its own offset, and mean |cosine| with others.
    """

    product: Tensor
    positive: float
    off_diagonal: float
    cosine: float
    cosine_off: float


def offset_product(weights: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> OffsetProduct:
    """W Δ, which theory says is about the identity: an offset moves its own concept's log-odds.

    Parameters
    ----------
    weights : (C, D) of :func:`probes`.
    pairs : for each concept the rows (P, D) without it, and the same contexts with it.

    Source: arXiv 2503.08980, §4: the mean offset of counterfactual pairs.
    """
    if len(pairs) != len(weights):
        raise GossamerError(f"{len(pairs)} concepts have pairs, {len(weights)} have probes")
    offsets = torch.stack([(after - before).mean(0) for before, after in pairs]).double()
    raw = weights.double() @ offsets.T
    # A probe's scale depends on its penalty, which is not what is asked.
    product = raw / raw.diagonal().abs().clamp_min(1e-12)[:, None]
    unit = nn.functional.normalize(weights.double(), dim=1)
    cosines = unit @ nn.functional.normalize(offsets, dim=1).T
    apart = ~torch.eye(len(raw), dtype=torch.bool)
    return OffsetProduct(
        product=product.float(),
        positive=float((raw.diagonal() > 0).double().mean()),
        off_diagonal=float(product.abs()[apart].mean()),
        cosine=float(cosines.diagonal().mean()),
        cosine_off=float(cosines.abs()[apart].mean()),
    )
