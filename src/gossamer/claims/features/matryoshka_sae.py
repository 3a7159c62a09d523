"""Matryoshka sparse autoencoders: general latents are not absorbed by specific ones."""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from math import ceil
from typing import Any

import torch

from gossamer.claims.base import Claim, Figures, Tier, Verdict, mean
from gossamer.claims.features.beds import fitted
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.batch_topk_sae import BatchTopKSAE
from gossamer.methods.features.matryoshka_sae import MatryoshkaSAE
from gossamer.methods.features.measure import matched_cosine, score_rows
from gossamer.methods.features.toy import Hierarchy

__all__ = ["CLAIMS"]

_BEDS: dict[Tier, Hierarchy] = {
    "smoke": Hierarchy(d_in=32, parents=6, children=4),
    "small": Hierarchy(d_in=64, parents=10, children=5),
}
_FRACTIONS = (1 / 8, 1 / 4, 5 / 8)


@torch.no_grad()
def _measured(name: str, bed: Hierarchy, made: Dictionary) -> Figures:
    rows, on = next(bed.labelled(8192, seed=500))
    parents = bed.true_atoms()[: bed.parents]
    unit = torch.nn.functional.normalize(made.W_dec, dim=1)
    best = (parents @ unit.T).argmax(1)
    fires = made.encode(rows).to_dense()[:, best] > 0
    with_child = on[:, bed.parents :].view(-1, bed.parents, bed.children).any(2)
    score = score_rows(made, islice(bed.batches(4096, seed=600), 2))
    return {
        f"absorbed_{name}": 1 - float(fires[with_child].double().mean()),
        f"false_{name}": float(fires[~on[:, : bed.parents]].double().mean()),
        f"fvu_{name}": score.fvu,
        f"l0_{name}": score.l0,
        f"mcc_{name}": matched_cosine(made.W_dec, bed.true_atoms()),
    }


def _absorption(tier: Tier, seed: int) -> Figures:
    bed = _BEDS[tier]
    bed = Hierarchy(**{**vars(bed), "seed": seed})
    k = ceil(bed.parents * bed.rate * (1 + bed.children * bed.child_rate))
    shared: dict[str, Any] = {"k": k, "width": 8 * ceil(len(bed.true_atoms()) / 8), "seed": seed}
    shared["lr"] = 5e-3 if tier == "smoke" else None
    nested = fitted(bed, MatryoshkaSAE(fractions=_FRACTIONS, **shared), tier)
    return {
        **_measured("nested", bed, nested),
        **_measured("flat", bed, fitted(bed, BatchTopKSAE(**shared), tier)),
    }


def _check(runs: Sequence[Figures]) -> Verdict:
    share = mean(runs, "absorbed_nested") / max(1e-9, mean(runs, "absorbed_flat"))
    cost = mean(runs, "fvu_nested") / mean(runs, "fvu_flat")
    # A latent that always fires absorbs nothing, and says nothing.
    if mean(runs, "false_nested") > 0.2 or share >= 1:
        return Verdict.FAILS
    return Verdict.HOLDS if share <= 0.5 and cost <= 1.3 else Verdict.WEAKER


_TEXT = {
    "sentence": "When the first latents must reconstruct alone, a general latent stays on where a "
    "specific one speaks too.",
    "paper": "Gemma 2 2B: far lower absorption and splitting than BatchTopK, at slightly worse "
    "explained variance",
    "check": _check,
    "ours": "parents off while a child is on: {absorbed_nested:.1%}, BatchTopK "
    "{absorbed_flat:.1%}; parents on without cause {false_nested:.1%} and {false_flat:.1%}; FVU "
    "{fvu_nested:.3f}, BatchTopK {fvu_flat:.3f} at L0 {l0_nested:.2f} and {l0_flat:.2f}",
}

CLAIMS = (
    Claim(
        name="less absorption, in brief",
        **_TEXT,
        experiment="6 parents with 4 children each in 32 dimensions, a child only with its "
        "parent, hardly more latents than atoms, 300 steps; holds when absorption is at most half "
        "of BatchTopK's and FVU at most 1.3 of it",
        run=partial(_absorption, "smoke"),
    ),
    Claim(
        name="less absorption",
        **_TEXT,
        experiment="10 parents with 5 children each in 64 dimensions, 3500 steps; same bounds",
        run=partial(_absorption, "small"),
        tier="small",
    ),
)
