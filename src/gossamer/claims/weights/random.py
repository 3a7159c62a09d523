"""Random pruning is the floor under every other method."""

from collections.abc import Sequence

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.lm import calibration, loss, nano
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.methods.weights.random import Random

__all__ = ["CLAIMS"]


def _run(seed: int) -> Figures:
    model = nano().model
    dense = loss(model)
    figures = {"dense": dense}
    for sparsity in (0.1, 0.3, 0.5):
        with Random(sparsity=sparsity, seed=seed).apply(model, calibration(0)) as applied:
            figures[f"random_{sparsity}"] = loss(model) - dense
            figures[f"achieved_{sparsity}"] = applied.report().sparsity
    with Magnitude(sparsity=0.3, pattern="row").apply(model) as applied:
        figures["magnitude_0.3"] = loss(model) - dense
    figures["restored"] = loss(model)
    return figures


def _check(runs: Sequence[Figures]) -> Verdict:
    for figures in runs:
        exact = all(abs(figures[f"achieved_{s}"] - s) < 2e-3 for s in (0.1, 0.3, 0.5))
        rising = 0.05 < figures["random_0.1"] < figures["random_0.3"] < figures["random_0.5"]
        if not (exact and rising and figures["restored"] == figures["dense"]):
            return Verdict.FAILS
    wide = mean(runs, "random_0.3") >= 3 * mean(runs, "magnitude_0.3")
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
        ours="loss over dense {random_0.1:+.2f} at 10 %, {random_0.3:+.2f} at 30 %, "
        "{random_0.5:+.2f} at 50 %; magnitude {magnitude_0.3:+.2f} at 30 %",
    ),
)
