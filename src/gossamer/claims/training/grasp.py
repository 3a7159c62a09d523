"""GraSP: better than random, and what shuffling, new weights and inverting do to it."""

from collections.abc import Sequence
from functools import partial

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.at_start import (
    beats_random,
    beats_random_check,
    loss_on_images,
    sanity,
)
from gossamer.methods.training.grasp import GraSP

__all__ = ["CLAIMS"]


def _sanity_check(runs: Sequence[Figures]) -> Verdict:
    found, inverted = mean(runs, "found"), mean(runs, "inverted")
    if found <= inverted:
        return Verdict.FAILS
    # Unspecific to weights: shuffling and new weights cost less than a point.
    same = all(mean(runs, name) > found - 1.0 for name in ("shuffled", "drawn_anew"))
    return Verdict.HOLDS if same else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="beats random",
        sentence="At extreme sparsity a network pruned before training by this score learns more "
        "than a random one, and than one that keeps what the score ranks lowest.",
        paper="above SNIP at 95 and 98 % on CIFAR and Tiny-ImageNet (tables 2 and 3)",
        experiment="digits, 64-300-100-10 at 98 % sparsity, 300 updates of SGD: accuracy with the "
        "score, with random masks of uniform shares, with the score inverted",
        run=partial(beats_random, cls=GraSP, loss=loss_on_images, steps=300),
        check=beats_random_check,
        ours="accuracy {method:.1f} %, random {random:.1f} %, inverted {inverted:.1f} %",
    ),
    Claim(
        name="sanity checks",
        sentence="What the score finds is how many weights each layer keeps, not which: shuffling "
        "masks within layers or drawing the weights anew costs little; inverting costs much.",
        paper="Frankle et al. (arXiv 2009.08576): true of SNIP, GraSP and SynFlow on CIFAR-10",
        experiment="digits, 64-300-100-10 at 95 % sparsity, 1500 updates of SGD: accuracy",
        run=partial(sanity, cls=GraSP, loss=loss_on_images),
        check=_sanity_check,
        ours="accuracy as found {found:.1f} %, shuffled {shuffled:.1f} %, weights drawn anew "
        "{drawn_anew:.1f} %, inverted {inverted:.1f} %",
        tier="small",
    ),
)
