"""Tests of a dictionary by known attributes: does it approximate, control, and read well?

Shapes: R = rows, D = width, M = latents, K = stored entries of a row.
"""

import torch
from torch import Tensor

from gossamer.core import GossamerError, check_count
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.separability import dense_codes

__all__ = ["approximation", "best_f1", "latent_weights", "sparse_edit"]


def approximation(clean: float, ablated: float, spliced: float) -> float:
    """Share of a task's logit difference that a reconstruction keeps: 1 all, 0 that of the mean.

    Raises
    ------
    GossamerError
        If ablating changes nothing: the place has no part in the task.
    """
    if clean == ablated:
        raise GossamerError("ablating this place changes nothing; choose one the task runs through")
    return (spliced - ablated) / (clean - ablated)


@torch.no_grad()
def sparse_edit(dictionary: Dictionary, clean: Tensor, other: Tensor, latents: int) -> Tensor:
    """Changes of (R, D) rows that swap at most so many latents of one input for another's.

    Greedy: each step takes over the value of the latent that brings the change closest to
    ``other - clean``, and stops where none brings it closer.

    Parameters
    ----------
    clean, other : (R, D), activations of an input and of its counterfactual.
    """
    check_count("latents", latents, 0)
    amounts = dense_codes(dictionary, other) - dense_codes(dictionary, clean)
    missing = other - clean
    change = torch.zeros_like(clean)
    own = dictionary.W_dec.square().sum(1)
    rows = torch.arange(len(clean), device=clean.device)
    for _ in range(latents):
        # ‖missing - a d‖² - ‖missing‖² = a² ‖d‖² - 2 a <missing, d>; 0 for what is used up.
        cost = amounts.square() * own - 2 * amounts * (missing @ dictionary.W_dec.T)
        best = cost.argmin(1)
        gain = torch.where(cost[rows, best] < 0, amounts[rows, best], 0.0)
        step = gain[:, None] * dictionary.W_dec[best]
        change, missing = change + step, missing - step
        amounts[rows, best] = 0
    return change


@torch.no_grad()
def best_f1(active: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """For each latent its best F1 as a detector of a value, and which value that is: (M,), (M,).

    Parameters
    ----------
    active : bool (R, M). truth : bool (R, V).
    """
    both = active.T.double() @ truth.double()
    score = 2 * both / (active.sum(0)[:, None] + truth.sum(0)[None]).clamp_min(1)
    return tuple(score.max(1))  # type: ignore[return-value]


@torch.no_grad()
def latent_weights(dictionary: Dictionary, rows: Tensor) -> Tensor:
    """(R, M): share of each latent in the reconstruction it is part of; a row sums to 1."""
    codes = dense_codes(dictionary, rows)
    made = codes @ dictionary.W_dec
    return codes * (made @ dictionary.W_dec.T) / made.square().sum(1, keepdim=True).clamp_min(1e-30)
