"""Oracle top-p: how few keys hold most of the attention."""

from collections.abc import Sequence

from gossamer.claims.attention.controls import LENGTH, kept
from gossamer.claims.base import Claim, Figures, Verdict
from gossamer.methods.attention.oracle_top_k import OracleTopK
from gossamer.methods.attention.oracle_top_p import OracleTopP

__all__ = ["CLAIMS"]

GAMMA = 0.9


def run(seed: int) -> Figures:
    covered = kept(OracleTopP(gamma=GAMMA, length=LENGTH), seed)
    same = kept(OracleTopK(sparsity=1 - covered["density"], length=LENGTH), seed)
    return {"mass": covered["mass"], "density": covered["density"], "fixed": same["mass"]}


def check(figures: Sequence[Figures]) -> Verdict:
    reached = all(f["mass"] >= GAMMA for f in figures)
    return Verdict.HOLDS if reached and all(f["density"] < 0.5 for f in figures) else Verdict.FAILS


CLAIMS = (
    Claim(
        name="few keys hold the mass",
        sentence="A share of the attention mass needs a much smaller share of the keys, and the "
        "number differs from query to query.",
        paper="the premise of every adaptive budget; no single paper's figure",
        experiment=f"the packaged model on held-out windows of {LENGTH} tokens, fewest keys that "
        f"hold {GAMMA:.0%} of the mass averaged over a group's heads; beside it the best fixed "
        "share of keys at the same density",
        run=run,
        check=check,
        ours="mass {mass:.3f} at density {density:.3f}; fixed share {fixed:.3f}",
    ),
)
