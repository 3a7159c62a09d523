"""BatchTopK sparse autoencoders: tokens share a budget, and are alone after training."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from gossamer.claims.base import Claim, Figures, Tier, Verdict, mean
from gossamer.claims.features.beds import BEDS, figures_of, fitted, held_out, on_bed
from gossamer.methods.features.batch_topk_sae import BatchTopKSAE
from gossamer.methods.features.topk_sae import TopKSAE

__all__ = ["CLAIMS"]


@torch.no_grad()
def _against_topk(tier: Tier, seed: int) -> Figures:
    bed = replace(BEDS[tier], seed=seed)
    k = round(bed.active)
    made = fitted(bed, BatchTopKSAE(k=k, seed=seed, width=2 * bed.atoms), tier)
    rows = held_out(bed)[0][:64]
    whole = made.encode(rows).to_dense()
    alone = torch.cat([made.encode(row[None]).to_dense() for row in rows])
    return {
        **figures_of("batch", bed, made),
        **on_bed("topk", TopKSAE(k=k, seed=seed), tier),
        "changed": float(((whole > 0) != (alone > 0)).any(1).double().mean()),
        "spread": float((whole > 0).sum(1).double().std()),
        "k": float(k),
    }


def _check(runs: Sequence[Figures]) -> Verdict:
    alone = mean(runs, "changed") == 0 and mean(runs, "spread") > 0
    near = abs(mean(runs, "l0_batch") / mean(runs, "k") - 1)
    share = mean(runs, "fvu_batch") / mean(runs, "fvu_topk")
    if not alone or near > 0.2 or share > 1.2:
        return Verdict.FAILS
    return Verdict.HOLDS if near <= 0.05 and share <= 1 else Verdict.WEAKER


_TEXT = {
    "sentence": "Letting the tokens of a batch compete for the budget reconstructs at least as "
    "well as k latents for each, and one threshold replaces the batch after training.",
    "paper": "GPT-2 small and Gemma 2 2B: lower error than TopK at equal mean L0",
    "check": _check,
    "ours": "FVU {fvu_batch:.3f} at L0 {l0_batch:.2f}, TopK {fvu_topk:.3f} at {l0_topk:.2f}; "
    "tokens whose code changes when they come alone: {changed:.0%}; latents of a token spread "
    "by {spread:.1f}; dead {dead_batch:.1%}, TopK {dead_topk:.1%}",
}

CLAIMS = (
    Claim(
        name="no worse than TopK, in brief",
        **_TEXT,
        experiment="rows made of 3 of 48 known atoms in 24 dimensions, 96 latents, 300 steps; "
        "holds when FVU is at most TopK's, mean L0 within 5 % of k, and no code depends on its "
        "batch",
        run=partial(_against_topk, "smoke"),
    ),
    Claim(
        name="no worse than TopK",
        **_TEXT,
        experiment="rows made of 5 of 96 known atoms in 32 dimensions, 192 latents, 3500 steps; "
        "same bounds",
        run=partial(_against_topk, "small"),
        tier="small",
    ),
)
