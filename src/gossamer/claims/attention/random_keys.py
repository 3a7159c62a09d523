"""Random keys: chance keeps about its share of the mass, and the query's own key."""

from collections.abc import Sequence

from gossamer.claims.attention.controls import LENGTH, kept
from gossamer.claims.base import Claim, Figures, Verdict
from gossamer.methods.attention.random_keys import RandomKeys

__all__ = ["CLAIMS"]

SPARSITY = 0.75


def run(seed: int) -> Figures:
    got = kept(RandomKeys(sparsity=SPARSITY, seed=seed, length=LENGTH), seed)
    return {"mass": got["mass"], "density": got["density"]}


def check(figures: Sequence[Figures]) -> Verdict:
    exact = all(abs(f["density"] - (1 - SPARSITY)) < 0.01 for f in figures)
    chance = all(f["density"] <= f["mass"] < 0.75 for f in figures)
    return Verdict.HOLDS if exact and chance else Verdict.FAILS


CLAIMS = (
    Claim(
        name="floor",
        sentence="Random keys keep their share of the pairs, and of the attention mass little "
        "more than that share and what each query gives itself.",
        paper="a control; no paper's figure",
        experiment=f"the packaged model on held-out windows of {LENGTH} tokens, {SPARSITY:.0%} of "
        "the causal pairs removed",
        run=run,
        check=check,
        ours="mass {mass:.3f} at density {density:.3f}",
    ),
)
