"""Crosscoders: which atoms two places share."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from gossamer.claims.base import Claim, Figures, Tier, Verdict, mean
from gossamer.claims.features.beds import BEDS, one_thread
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.crosscoder import Crosscoder, ownership
from gossamer.methods.features.toy import Shared, Superposition
from gossamer.methods.features.training import train

__all__ = ["CLAIMS"]

_BEDS: dict[Tier, Superposition] = {
    "smoke": Superposition(d_in=24, atoms=40, active=2.0),
    "small": BEDS["small"],
}
_STEPS: dict[Tier, tuple[int, int, float]] = {
    "smoke": (400, 128, 1e-2),
    "small": (3500, 512, 2e-3),
}


@torch.no_grad()
def _auroc(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Probability that a positive scores above a negative."""
    pairs = score[positive][:, None] - score[~positive][None]
    return float(((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean())


@torch.no_grad()
def _told_apart(bed: Shared, made: Dictionary) -> Figures:
    true, owner = bed.true_atoms(), bed.owners()
    cosine = nn.functional.normalize(true, dim=1) @ nn.functional.normalize(made.W_dec, dim=1).T
    best, at = cosine.max(1)
    wide = bed.bed.d_in
    where = ownership(made, (wide, wide))[at]
    # Of the atoms that were found: those it missed have no owner to tell.
    found = best > 0.8
    private, shared = found & (owner > 0), found & (owner == 0)
    far = (where - 0.5).abs()
    right = torch.where(owner == 1, where < 0.1, where > 0.9)[private]
    return {
        "found": float(found.double().mean()),
        "private_found": float(private.sum()),
        "right": float(right.double().mean()) if len(right) else 0.0,
        "centred": float((far[shared] <= 0.1).double().mean()) if shared.any() else 0.0,
        "auroc": _auroc(far[found], owner[found] > 0) if private.any() and shared.any() else 0.5,
    }


def _diff(tier: Tier, seed: int) -> Figures:
    bed = Shared(replace(_BEDS[tier], seed=seed))
    steps, batch, lr = _STEPS[tier]
    k, wide = round(bed.bed.active), bed.bed.d_in
    method = Crosscoder(k=k, width=2 * bed.bed.atoms, seed=seed, lr=lr)
    recipe = method.recipe(steps, batch)
    with one_thread():
        made = train(
            bed.batches(batch, seed=seed),
            width=2 * bed.bed.atoms,
            rule=method.rule(),
            recipe=recipe,
            sites=(wide, wide),
        )
        chance = Dictionary.random(2 * wide, 2 * bed.bed.atoms, method.rule(), seed=seed + 1)
        return {**_told_apart(bed, made), "found_random": _told_apart(bed, chance)["found"]}


def _check(runs: Sequence[Figures]) -> Verdict:
    if mean(runs, "auroc") <= 0.6 or mean(runs, "found") <= mean(runs, "found_random") + 0.1:
        return Verdict.FAILS
    every = mean(runs, "right") == 1 and mean(runs, "centred") == 1
    return Verdict.HOLDS if mean(runs, "auroc") >= 0.95 and every else Verdict.WEAKER


_TEXT = {
    "sentence": "One dictionary of two models' activations tells atoms both share from atoms of "
    "one alone, by the norms of its atoms.",
    "paper": "base and chat models: latents fall into shared and private by relative norm",
    "check": _check,
    "ours": "shared and private told apart with an AUROC of {auroc:.3f}; private atoms at their "
    "owner (below 0.1 or above 0.9) {right:.0%}, shared within 0.4 to 0.6 {centred:.0%}; true "
    "atoms found (cosine above 0.8) {found:.0%}, by chance {found_random:.0%}",
}

CLAIMS = (
    Claim(
        name="tells shared from private, in brief",
        **_TEXT,
        experiment="two views in 24 dimensions of one code of 40 atoms, 2 in a row, a tenth of "
        "them shown by one view alone and a tenth by the other; 400 steps; holds when the AUROC is "
        "at least 0.95 and every atom found lies where it should",
        run=partial(_diff, "smoke"),
    ),
    Claim(
        name="tells shared from private",
        **_TEXT,
        experiment="as above with 5 of 96 atoms in a row, 32 dimensions and 3500 steps",
        run=partial(_diff, "small"),
        tier="small",
    ),
)
