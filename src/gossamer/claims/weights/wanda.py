"""Wanda beats magnitude, and does not care how loud a channel is scaled."""

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from torch import nn

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.lm import calibration, loss, nano, outlier_channels
from gossamer.core import Budget, Stat, Unstructured
from gossamer.core.scores import magnitude as size
from gossamer.core.scores import weight_times_input
from gossamer.methods import make, parse_method
from gossamer.models import find_sites, stream

__all__ = ["CLAIMS"]

_PERCENTS = (30, 50)


def _quality(seed: int) -> Figures:
    model, tokens = nano().model, calibration(seed)
    dense = loss(model)
    figures: dict[str, float] = {"dense": dense}
    for percent in _PERCENTS:
        for key in ("wanda", "magnitude", "random"):
            method = parse_method(key, sparsity=percent / 100, pattern="row", seed=seed)
            with method.apply(model, tokens):
                figures[f"{key}_{percent}"] = loss(model) - dense
    return figures


def _quality_check(runs: Sequence[Figures]) -> Verdict:
    verdict = Verdict.HOLDS
    for percent in _PERCENTS:
        wanda, magnitude, random = (
            mean(runs, f"{name}_{percent}") for name in ("wanda", "magnitude", "random")
        )
        if not wanda < random / 2:
            return Verdict.FAILS
        if not wanda < magnitude < random / 1.5:
            verdict = Verdict.WEAKER if wanda < 1.05 * magnitude else Verdict.FAILS
    return verdict


def _masks(model: nn.Module, method: Any, tokens: Any) -> dict[str, torch.Tensor]:
    with method.apply(model, tokens) as applied:
        return {name: applied.selection(name).mask() for name in applied.masks}


def _invariance(seed: int) -> Figures:
    model, tokens = nano().model, calibration(seed)
    wanda, magnitude = (make(k, sparsity=0.5, pattern="row") for k in ("wanda", "magnitude"))
    dense = loss(model)
    before = {m.key(): _masks(model, m, tokens) for m in (wanda, magnitude)}
    with magnitude.apply(model):
        plain = loss(model) - dense
    with outlier_channels(model, seed):
        same_function = float(loss(model) == dense)
        after = {m.key(): _masks(model, m, tokens) for m in (wanda, magnitude)}
        with magnitude.apply(model):
            loud = loss(model) - dense
    changed = {
        key: float(sum(int((before[key][n] != after[key][n]).sum()) for n in before[key]))
        for key in before
    }
    return {
        "same_function": same_function,
        "wanda_changed": changed["wanda"],
        "magnitude_changed": changed["magnitude"],
        "magnitude_plain": plain,
        "magnitude_loud": loud,
    }


def _invariance_check(runs: Sequence[Figures]) -> Verdict:
    if any(f["same_function"] != 1.0 for f in runs) or any(f["wanda_changed"] for f in runs):
        return Verdict.FAILS
    if any(f["magnitude_changed"] == 0 for f in runs):
        return Verdict.FAILS
    # 20 % more perplexity is log(1.2) more loss.
    worse = mean(runs, "magnitude_loud") >= mean(runs, "magnitude_plain") + log(1.2)
    return Verdict.HOLDS if worse else Verdict.WEAKER


def _reconstruction(seed: int) -> Figures:
    """Share of layers whose outputs Wanda keeps better than magnitude at 50 % per row."""
    model, tokens = nano().model, calibration(seed)
    better: list[bool] = []

    def measure(block: Any) -> None:
        for site in block.sites:
            weight = site.weight(model)
            hessian = block.stats[site.name][Stat.HESSIAN].double()
            norm = hessian.diagonal().sqrt().float()
            errors = []
            for score in (weight_times_input(weight, norm), size(weight)):
                keep = Unstructured("row").select(score, Budget(sparsity=0.5)).mask()
                lost = weight.masked_fill(keep, 0).double()
                errors.append(float(((lost @ hessian) * lost).sum()))
            better.append(errors[0] < errors[1])

    sites = find_sites(model)
    stream(model, tokens, frozenset({Stat.HESSIAN}), measure, sites=sites, recompute=False)
    return {"better": sum(better) / len(better), "layers": float(len(better))}


def _reconstruction_check(runs: Sequence[Figures]) -> Verdict:
    share = mean(runs, "better")
    if share >= 0.95:
        return Verdict.HOLDS
    return Verdict.WEAKER if share > 0.5 else Verdict.FAILS


CLAIMS = (
    Claim(
        name="beats magnitude",
        sentence="At equal sparsity Wanda loses less than magnitude pruning, without any update.",
        paper="LLaMA-2-7B at 50 %: perplexity 6.42 against 14.89 (dense 5.12)",
        experiment="{model}, loss over dense at 30 % and 50 % per row, 3 calibration draws, "
        "random beside it",
        portable=True,
        run=_quality,
        check=_quality_check,
        ours="loss over dense {dense:.2f}: at 30 % Wanda {wanda_30:+.3f}, magnitude "
        "{magnitude_30:+.3f}, random {random_30:+.2f}; at 50 % {wanda_50:+.3f}, "
        "{magnitude_50:+.3f}, {random_50:+.2f}",
    ),
    Claim(
        name="ignores channel scale",
        sentence="Rescaling a channel and the weights that read it leaves Wanda's mask unchanged; "
        "magnitude's mask follows the scale.",
        paper="outlier channels of large models are why magnitude fails there (§2)",
        experiment="packaged model re-parameterised with 8 channels a norm 32 times louder: the "
        "same function; masks at 50 % per row compared bit by bit",
        run=_invariance,
        check=_invariance_check,
        ours="weights whose fate changed: Wanda {wanda_changed:.0f}, magnitude "
        "{magnitude_changed:.0f}; magnitude's loss {magnitude_plain:+.2f} to {magnitude_loud:+.2f}",
    ),
    Claim(
        name="keeps layer outputs",
        sentence="The score follows the change of a layer's output, so the output is kept better.",
        paper="the score's derivation (§3)",
        experiment="packaged model, every layer at 50 % per row, squared error of its outputs on "
        "calibration text, against magnitude",
        run=_reconstruction,
        check=_reconstruction_check,
        ours="smaller error than magnitude in {better:.1%} of {layers:.0f} layers",
    ),
)
