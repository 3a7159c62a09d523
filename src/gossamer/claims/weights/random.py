"""Random pruning is the floor under every other method."""

from collections.abc import Sequence

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.lm import loss, nano
from gossamer.methods import make
from gossamer.methods.weights.random import Random

__all__ = ["CLAIMS"]

_PERCENTS = (10, 30, 50)


def _run(seed: int) -> Figures:
    model = nano().model
    dense = loss(model)
    figures = {"dense": dense}
    for percent in _PERCENTS:
        with Random(sparsity=percent / 100, seed=seed).apply(model) as applied:
            figures[f"random_{percent}"] = loss(model) - dense
            figures[f"achieved_{percent}"] = applied.report().sparsity
    with make("magnitude", sparsity=0.3, pattern="row").apply(model):
        figures["magnitude_30"] = loss(model) - dense
    figures["restored"] = loss(model)
    return figures


def _check(runs: Sequence[Figures]) -> Verdict:
    for figures in runs:
        exact = all(abs(figures[f"achieved_{p}"] - p / 100) < 2e-3 for p in _PERCENTS)
        rising = 0.05 < figures["random_10"] < figures["random_30"] < figures["random_50"]
        if not (exact and rising and figures["restored"] == figures["dense"]):
            return Verdict.FAILS
    wide = mean(runs, "random_30") >= 3 * mean(runs, "magnitude_30")
    return Verdict.HOLDS if wide else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="is the floor",
        sentence="Weights removed by lot cost far more than the smallest weights, and ever more.",
        paper="no paper: the control of every comparison",
        experiment="packaged model, loss over dense at 10, 30 and 50 % per row, 3 masks; "
        "magnitude beside it",
        run=_run,
        check=_check,
        ours="loss over dense {random_10:+.2f} at 10 %, {random_30:+.2f} at 30 %, "
        "{random_50:+.2f} at 50 %; magnitude {magnitude_30:+.2f} at 30 %",
    ),
)
