"""Codes: one whole number for what a head says about an example, and what the numbers tell.

Shapes: N = examples, A = heads of all blocks, D = hidden width, M = latents.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import ReLU
from gossamer.methods.features.training import Recipe, train
from gossamer.models import Progress

__all__ = ["SILENT", "edge_scores", "fit_codes", "head_codes", "head_scores"]

SILENT = -1
"""Code of a head of which no latent speaks; it is a code of its own, not latent 0."""


def fit_codes(
    outputs: Tensor,
    *,
    latents: int = 200,
    penalty: float = 0.02,
    steps: int = 500,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Dictionary:
    """One ReLU dictionary shared by all heads, trained on all outputs in every step.

    Parameters
    ----------
    outputs : (N, A, D). penalty : weight of the L1 term, for rows scaled to norm sqrt(D).
    """
    rows = outputs.flatten(0, 1)

    def batches() -> Iterator[Tensor]:
        while True:
            yield rows

    recipe = Recipe(
        steps=steps, batch_size=len(rows), lr=lr, warmup=0, decay=0.2, aux_k=0, seed=seed
    )
    return train(batches(), width=latents, rule=ReLU(penalty), recipe=recipe, progress=progress)


@torch.no_grad()
def head_codes(made: Dictionary, outputs: Tensor) -> Tensor:
    """The loudest latent of every head's output, int64 (N, A); :data:`SILENT` where none speaks."""
    values, index = made.pre_activations(outputs.flatten(0, 1)).max(1)
    return index.masked_fill(values <= 0, SILENT).view(outputs.shape[:2])


def head_scores(positive: Tensor, negative: Tensor, *, share: bool = False) -> Tensor:
    """How many codes of each head occur in solvable examples alone, (A,) float64.

    Parameters
    ----------
    positive, negative : int64 (N, A), codes of solvable and of corrupted examples.
    share : divide by how many codes the head uses in all, so that a head which uses many
        codes anyway does not win by that.
    """
    scores = []
    for one, other in zip(positive.T.tolist(), negative.T.tolist(), strict=True):
        own, all_of = set(one) - set(other), set(one) | set(other)
        scores.append(len(own) / (len(all_of) if share else 1))
    return torch.tensor(scores, dtype=torch.float64)


def edge_scores(positive: Tensor, negative: Tensor) -> Tensor:
    """How many pairs of codes two heads use together in solvable examples alone, (A, A).

    The pairs of a head with itself are its codes, so the diagonal is :func:`head_scores`.
    """
    heads = positive.shape[1]
    scores = torch.zeros(heads, heads, dtype=torch.float64)
    for one in range(heads):
        for other in range(one, heads):
            here = set(map(tuple, positive[:, [one, other]].tolist()))
            there = set(map(tuple, negative[:, [one, other]].tolist()))
            scores[one, other] = scores[other, one] = len(here - there)
    return scores
