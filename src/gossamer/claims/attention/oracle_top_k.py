"""Oracle top-k: nothing keeps more mass at the same number of keys."""

from collections.abc import Sequence

from gossamer.claims.attention.controls import LENGTH, kept
from gossamer.claims.base import Claim, Figures, Verdict
from gossamer.methods.attention.oracle_top_k import OracleTopK
from gossamer.methods.attention.random_keys import RandomKeys
from gossamer.methods.attention.streaming_llm import StreamingLLM

__all__ = ["CLAIMS"]

SPARSITY = 0.9


def run(seed: int) -> Figures:
    oracle = kept(OracleTopK(sparsity=SPARSITY, length=LENGTH), seed)
    window = kept(StreamingLLM(sparsity=SPARSITY, length=LENGTH), seed)
    chance = kept(RandomKeys(sparsity=SPARSITY, seed=seed, length=LENGTH), seed)
    return {
        "oracle": oracle["mass"],
        "density": oracle["density"],
        "window": window["mass"],
        "random": chance["mass"],
    }


def check(figures: Sequence[Figures]) -> Verdict:
    good = all(f["oracle"] > f["window"] > f["random"] for f in figures)
    return Verdict.HOLDS if good else Verdict.FAILS


CLAIMS = (
    Claim(
        name="ceiling",
        sentence="At the same number of keys the true best keep more attention mass than a window "
        "with sinks, and that more than random keys.",
        paper="follows from the definition; no paper's figure",
        experiment=f"the packaged model on held-out windows of {LENGTH} tokens, {SPARSITY:.0%} of "
        "the causal pairs removed",
        run=run,
        check=check,
        ours="mass {oracle:.3f} (density {density:.3f}), window {window:.3f}, random {random:.3f}",
    ),
)
