"""Magnitude pruning beats chance, and what its group of comparison changes."""

from collections.abc import Sequence

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.lm import calibration, loss, nano
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.methods.weights.random import Random

__all__ = ["CLAIMS"]

_FORMS = {
    "row": {"pattern": "row"},
    "layer": {"pattern": "layer"},
    "model": {"pattern": "model"},
    "erk": {"pattern": "layer", "allocation": "erk"},
}


def _run(seed: int) -> Figures:
    model = nano().model
    dense = loss(model)
    figures = {}
    for sparsity in (0.3, 0.5):
        for name, options in _FORMS.items():
            with Magnitude(sparsity=sparsity, **options).apply(model):
                figures[f"{name}_{sparsity}"] = loss(model) - dense
        with Random(sparsity=sparsity, seed=seed).apply(model, calibration(0)):
            figures[f"random_{sparsity}"] = loss(model) - dense
    return figures


def _check(runs: Sequence[Figures]) -> Verdict:
    for sparsity in (0.3, 0.5):
        floor = mean(runs, f"random_{sparsity}")
        if any(mean(runs, f"{name}_{sparsity}") >= floor for name in _FORMS):
            return Verdict.FAILS
    far = all(mean(runs, f"random_{s}") >= 2 * mean(runs, f"row_{s}") for s in (0.3, 0.5))
    return Verdict.HOLDS if far else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="beats random",
        sentence="The smallest weights can be removed at a fraction of the loss of random ones.",
        paper="LLaMA-2-7B at 50 %: perplexity 5.12 to 14.89 (Wanda's table)",
        experiment="packaged model, loss over dense at 30 % and 50 % per row, per layer, over the "
        "model and with ERK, against 3 random masks",
        run=_run,
        check=_check,
        ours="loss over dense at 50 %: row {row_0.5:+.2f}, layer {layer_0.5:+.2f}, model "
        "{model_0.5:+.2f}, ERK {erk_0.5:+.2f}, random {random_0.5:+.2f}; at 30 %: row "
        "{row_0.3:+.2f}, random {random_0.3:+.2f}",
    ),
)
