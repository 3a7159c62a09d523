"""Magnitude pruning beats chance, and what its group of comparison changes."""

from collections.abc import Sequence
from functools import cache

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.lm import loss, nano
from gossamer.methods import make
from gossamer.methods.weights.random import Random

__all__ = ["CLAIMS"]

_PERCENTS = (30, 50)
_FORMS = {
    "row": {"pattern": "row"},
    "layer": {"pattern": "layer"},
    "model": {"pattern": "model"},
    "erk": {"pattern": "layer", "allocation": "erk"},
}


@cache
def _magnitude() -> Figures:
    """Magnitude has no randomness: measured once for all seeds."""
    model = nano().model
    dense = loss(model)
    figures = {}
    for percent in _PERCENTS:
        for name, options in _FORMS.items():
            with make("magnitude", sparsity=percent / 100, **options).apply(model):
                figures[f"{name}_{percent}"] = loss(model) - dense
    return {"dense": dense, **figures}


def _run(seed: int) -> Figures:
    figures = dict(_magnitude())
    model = nano().model
    for percent in _PERCENTS:
        with Random(sparsity=percent / 100, seed=seed).apply(model):
            figures[f"random_{percent}"] = loss(model) - figures["dense"]
    return figures


def _check(runs: Sequence[Figures]) -> Verdict:
    for percent in _PERCENTS:
        floor = mean(runs, f"random_{percent}")
        if any(mean(runs, f"{name}_{percent}") >= floor for name in _FORMS):
            return Verdict.FAILS
    far = all(mean(runs, f"random_{p}") >= 2 * mean(runs, f"row_{p}") for p in _PERCENTS)
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
        ours="loss over dense at 50 %: row {row_50:+.2f}, layer {layer_50:+.2f}, model "
        "{model_50:+.2f}, ERK {erk_50:+.2f}, random {random_50:+.2f}; at 30 %: row "
        "{row_30:+.2f}, random {random_30:+.2f}",
    ),
)
