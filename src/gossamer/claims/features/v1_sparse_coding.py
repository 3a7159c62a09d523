"""Proximal sparse coding in V1: fewer coefficients for the same error, fields alike."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from gossamer.claims.base import Claim, Figures, Tier, Verdict, mean
from gossamer.claims.features.beds import one_thread
from gossamer.methods.features.v1_sparse_coding import V1SparseCoding
from gossamer.methods.features.vision import SparseCoder, gabor_like, natural_patches
from gossamer.methods.features.vision.coder import Penalty

__all__ = ["CLAIMS"]

_ERROR = 0.2
# The weights at which the error of training is about the one compared at.
_WEIGHTS: dict[Penalty, float] = {"soft": 1.5, "hard": 5.0, "cel0": 4.0}


class _Bed(NamedTuple):
    size: int
    atoms: int
    updates: int
    batch: int
    steps: int
    tested: int


_BEDS: dict[Tier, _Bed] = {
    "smoke": _Bed(8, 96, 120, 96, 20, 256),
    "small": _Bed(12, 288, 400, 128, 20, 384),
}


def _at_error(coder: SparseCoder, x: Tensor) -> tuple[float, float]:
    """Coefficients a patch and share of unexplained energy at the weight that gives the error."""
    low, high, found = 1e-2, 1e2, (0.0, 0.0)
    for _ in range(12):
        coder.weight = (low * high) ** 0.5
        code = coder.codes(x)
        error = float((x - code @ coder.atoms).square().sum() / x.square().sum())
        found = float((code != 0).float().sum(1).mean()), error
        low, high = (coder.weight, high) if error < _ERROR else (low, coder.weight)
    return found


def _compare(tier: Tier, seed: int) -> Figures:
    bed = _BEDS[tier]
    figures: dict[str, float] = {}
    with one_thread():
        seen = natural_patches(20_000, bed.size, seed=seed)
        new = natural_patches(bed.tested, bed.size, seed=seed, held_out=True)
        for penalty, weight in _WEIGHTS.items():
            coder = SparseCoder(bed.size**2, bed.atoms, seed=seed)
            method = V1SparseCoding(
                penalty=penalty,
                weight=weight,
                updates=bed.updates,
                lr=0.3 if tier == "smoke" else 0.2,
                batch_size=bed.batch,
                steps=bed.steps,
                seed=seed,
            )
            untrained = SparseCoder(bed.size**2, bed.atoms, seed=seed)
            untrained.configure(penalty, weight, bed.steps)
            with method.apply(coder, seen) as applied:
                figures[f"gabor_{penalty}"] = applied.oriented()
                figures[f"l0_{penalty}"], figures[f"fvu_{penalty}"] = _at_error(coder, new)
            if penalty == "hard":
                figures["l0_random"], figures["fvu_random"] = _at_error(untrained, new)
        share = float(gabor_like(untrained.atoms).float().mean())
    return {**figures, "gabor_random": share}


def _check(runs: Sequence[Figures]) -> Verdict:
    equal = all(
        abs(run[f"fvu_{name}"] - _ERROR) < 0.02 for run in runs for name in (*_WEIGHTS, "random")
    )
    soft, hard, cel0 = (mean(runs, f"l0_{name}") for name in _WEIGHTS)
    learned = mean(runs, "l0_random") >= 1.3 * hard and mean(runs, "gabor_random") < 0.1
    if not (equal and learned and soft > hard and soft > cel0):
        return Verdict.FAILS
    oriented = all(mean(runs, f"gabor_{name}") >= 0.5 for name in _WEIGHTS)
    ratios = soft >= 1.3 * hard and soft >= 1.2 * cel0
    return Verdict.HOLDS if ratios and oriented else Verdict.WEAKER


_TEXT = {
    "sentence": "Thresholds other than the soft one code natural images with fewer coefficients "
    "at the same error, and their atoms look like simple cells' fields as well.",
    "paper": "no figure: soft thresholding needs denser codes or more neurons for the same error "
    "(from the paper's text, quoted from memory)",
    "check": _check,
    "ours": "coefficients a patch at FVU 0.2: soft {l0_soft:.2f}, hard {l0_hard:.2f}, CEL0 "
    "{l0_cel0:.2f}, hard over random atoms {l0_random:.2f}; Gabor-like atoms: {gabor_soft:.0%}, "
    "{gabor_hard:.0%}, {gabor_cel0:.0%}, of random atoms {gabor_random:.0%}",
}
_BOUNDS = (
    "codes of unseen patches from scikit-learn's two photographs, whitened, with the weight that "
    "gives FVU 0.2; holds when soft needs 1.3 times the coefficients of hard and 1.2 times those "
    "of CEL0, and half of all atoms are oriented and Gabor-like (R² above 0.6)"
)

CLAIMS = (
    Claim(
        name="sparser at equal error, in brief",
        **_TEXT,
        experiment=f"96 atoms of 8 x 8 pixels, 120 updates; {_BOUNDS}",
        run=partial(_compare, "smoke"),
    ),
    Claim(
        name="sparser at equal error",
        **_TEXT,
        experiment=f"288 atoms of 12 x 12 pixels, 400 updates; {_BOUNDS}",
        run=partial(_compare, "small"),
        tier="small",
    ),
)
