"""ReLU sparse autoencoders: finds atoms, and shrinks what it keeps."""

from collections.abc import Sequence
from functools import partial

from gossamer.claims.base import Claim, Figures, Tier, Verdict, mean
from gossamer.claims.features.beds import on_bed, random_figures
from gossamer.methods.features.relu_sae import ReLUSAE
from gossamer.methods.features.topk_sae import TopKSAE

__all__ = ["CLAIMS"]

# Chosen so that the penalised code is about as dense as the true one.
_L1 = 3.75


def _shrinks(tier: Tier, seed: int) -> Figures:
    method = ReLUSAE(coefficient=_L1, seed=seed)
    k = 3 if tier == "smoke" else 5
    return {
        **on_bed("l1", method, tier),
        **on_bed("topk", TopKSAE(k=k, seed=seed), tier),
        **random_figures(tier, TopKSAE(k=k, seed=seed)),
        "k": float(k),
    }


def _check(runs: Sequence[Figures]) -> Verdict:
    sparse = mean(runs, "l0_l1") <= 2 * mean(runs, "k")
    found = mean(runs, "mcc_l1") >= mean(runs, "mcc_random") + 0.1
    shrinks = mean(runs, "shrinkage_l1") < 0.85 and mean(runs, "shrinkage_topk") >= 0.98
    if not (sparse and found and shrinks):
        return Verdict.FAILS
    return Verdict.HOLDS if mean(runs, "mcc_l1") >= 0.8 else Verdict.WEAKER


_TEXT = {
    "sentence": "A ReLU code with an L1 penalty finds the atoms that rows are made of, and makes "
    "its reconstructions too small.",
    "paper": "Pythia-70M and GPT-2 small: latents more interpretable than neurons; shrinkage was "
    "named later (arXiv 2404.16014: reconstructions 10 to 20 % too small, quoted from memory)",
    "check": _check,
    "ours": "reconstructions {shrinkage_l1:.2f} of their due size at L0 {l0_l1:.1f} (TopK "
    "{shrinkage_topk:.2f}); true atoms found (MCC) {mcc_l1:.2f}, TopK {mcc_topk:.2f}, random "
    "{mcc_random:.2f}; FVU {fvu_l1:.3f}, TopK {fvu_topk:.3f}",
}

CLAIMS = (
    Claim(
        name="finds atoms and shrinks, in brief",
        **_TEXT,
        experiment="rows made of 3 of 48 known atoms in 24 dimensions, 96 latents, 300 steps; "
        "holds when what is kept comes out below 0.85 of its size (TopK: at least 0.98) and MCC "
        "reaches 0.8",
        run=partial(_shrinks, "smoke"),
    ),
    Claim(
        name="finds atoms and shrinks",
        **_TEXT,
        experiment="rows made of 5 of 96 known atoms in 32 dimensions, 192 latents, 3500 steps; "
        "same bounds",
        run=partial(_shrinks, "small"),
        tier="small",
    ),
)
