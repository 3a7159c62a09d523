"""SynFlow: better than random, and what shuffling, new weights and inverting do to it."""

from collections.abc import Sequence
from functools import partial

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.at_start import (
    beats_random,
    beats_random_check,
    flow_of_ones,
    kept,
    sanity,
)
from gossamer.claims.training.digits import mlp
from gossamer.core import kept_count
from gossamer.core.allocate import global_
from gossamer.methods.training.synflow import SynFlow

__all__ = ["CLAIMS"]


def _sanity_check(runs: Sequence[Figures]) -> Verdict:
    found, inverted = mean(runs, "found"), mean(runs, "inverted")
    if found <= inverted:
        return Verdict.FAILS
    # Unspecific to weights: shuffling and new weights cost less than a point.
    same = all(mean(runs, name) > found - 1.0 for name in ("shuffled", "drawn_anew"))
    return Verdict.HOLDS if same else Verdict.WEAKER


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
    Claim(
        name="beats random",
        sentence="At extreme sparsity a network pruned before training by this score learns more "
        "than a random one, and than one that keeps what the score ranks lowest.",
        paper="above random, magnitude, SNIP and GraSP at extreme sparsity (figure 6)",
        experiment="digits, 64-300-100-10 at 98 % sparsity, 300 updates of SGD: accuracy with the "
        "score, with random masks of uniform shares, with the score inverted",
        run=partial(beats_random, cls=SynFlow, loss=flow_of_ones, steps=300),
        check=beats_random_check,
        ours="accuracy {method:.1f} %, random {random:.1f} %, inverted {inverted:.1f} %",
    ),
    Claim(
        name="sanity checks",
        sentence="What the score finds is how many weights each layer keeps, not which: shuffling "
        "masks within layers or drawing the weights anew costs little; inverting costs much.",
        paper="Frankle et al. (arXiv 2009.08576): true of SNIP, GraSP and SynFlow on CIFAR-10",
        experiment="digits, 64-300-100-10 at 95 % sparsity, 1500 updates of SGD: accuracy",
        run=partial(sanity, cls=SynFlow, loss=flow_of_ones),
        check=_sanity_check,
        ours="accuracy as found {found:.1f} %, shuffled {shuffled:.1f} %, weights drawn anew "
        "{drawn_anew:.1f} %, inverted {inverted:.1f} %",
        tier="small",
    ),
)
