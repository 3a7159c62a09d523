"""Match: how well single latents follow the log-odds of concepts.

Shapes: N = rows, M = latents, C = concepts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["ConceptMatch", "concept_match"]


class ConceptMatch(NamedTuple):
    """Latents held against concepts.

    Parameters
    ----------
    best : (C,), largest |Pearson correlation| of a latent with the concept's log-odds.
    latent : int64 (C,), that latent.
    """

    best: Tensor
    latent: Tensor

    @property
    def mean(self) -> float:
        """Mean over concepts: the figure to compare dictionaries by."""
        return float(self.best.mean())


@torch.no_grad()
def concept_match(codes: Tensor, logits: Tensor) -> ConceptMatch:
    """The latent that follows each concept best.

    Correlation, not explained variance, so that a latent's scale does not count.

    Parameters
    ----------
    codes : (N, M). logits : (N, C), log-odds of each concept.

    Raises
    ------
    GossamerError
        If the rows differ or are fewer than 2.
    """
    if len(codes) != len(logits) or len(codes) < 2:
        raise GossamerError(f"{len(codes)} codes and {len(logits)} rows of log-odds; give as many")
    z = codes.double() - codes.double().mean(0)
    y = logits.double() - logits.double().mean(0)
    z, y = (part / part.norm(dim=0).clamp_min(1e-12) for part in (z, y))
    best, latent = (y.T @ z).abs().max(1)
    return ConceptMatch(best, latent)
