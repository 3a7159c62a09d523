"""SynFlow: better than random, and what shuffling, new weights and inverting do to it."""

from collections.abc import Sequence

from gossamer.claims.base import Claim, Figures, Verdict
from gossamer.claims.training.at_start import flow_of_ones, kept, score_claims
from gossamer.claims.training.digits import mlp
from gossamer.core import kept_count
from gossamer.core.allocate import global_
from gossamer.methods.training.synflow import SynFlow

__all__ = ["CLAIMS"]


def _collapse(seed: int) -> Figures:
    """Weights left to the poorest layer at 99.9 %: in rounds, at once, and by global magnitude."""
    net = mlp(seed)
    weights = {n: p.detach().abs() for n, p in net.named_parameters() if p.dim() > 1}
    magnitude = global_(weights, 0.999)
    left = [kept_count(weights[name].numel(), share) for name, share in magnitude.items()]
    rounds = kept(SynFlow(sparsity=0.999), seed, flow_of_ones)
    at_once = kept(SynFlow(sparsity=0.999, rounds=1), seed, flow_of_ones)
    return {
        "rounds": min(rounds.values()),
        "at_once": min(at_once.values()),
        "magnitude": min(left),
    }


def _collapse_check(runs: Sequence[Figures]) -> Verdict:
    # gossamer leaves a layer its best weight where the score would empty it: 1 is a collapse.
    alive = all(f["rounds"] > 1 for f in runs)
    dead = all(f["at_once"] <= 1 and f["magnitude"] == 0 for f in runs)
    if alive and dead:
        return Verdict.HOLDS
    return Verdict.WEAKER if alive else Verdict.FAILS


CLAIMS = (
    Claim(
        name="no layer dies",
        sentence="In rounds, the conserved flow keeps every layer alive where one shot, or the "
        "magnitude of all weights, empties one.",
        paper="§5: iterative SynFlow reaches maximal critical compression",
        experiment="untrained 64-300-100-10 at 99.9 % sparsity: weights of the poorest layer with "
        "100 rounds, 1 round (floored at 1), and by magnitude over all layers",
        run=_collapse,
        check=_collapse_check,
        ours="{rounds:.1f} weights in rounds, {at_once:.1f} at once, {magnitude:.1f} by magnitude",
    ),
    *score_claims(
        SynFlow,
        flow_of_ones,
        "above random, magnitude, SNIP and GraSP at extreme sparsity (from memory)",
    ),
)
