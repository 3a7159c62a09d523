"""What the claims on masked activations share: small texts, perplexity, ablations of a score."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.claims.base import Figures, Verdict, mean
from gossamer.claims.lm import calibration, heldout, nano
from gossamer.evaluate import score
from gossamer.models import Tokens

__all__ = ["WINDOWS", "activated", "at_most", "perplexity", "text", "under", "worst"]

WINDOWS = 4  # of 256 tokens, for calibration and for held-out text


def text(seed: int, windows: int = WINDOWS) -> Tokens:
    """Calibration text of a seed."""
    return calibration(seed, windows)


def perplexity(windows: int = WINDOWS) -> float:
    """Held-out perplexity of the packaged model as it is now."""
    return exp(score(nano().model, heldout(windows), batch_size=4).loss)


def under(method: Any, seed: int, windows: int = WINDOWS) -> float:
    """Held-out perplexity with a method at work, calibrated on a seed's text."""
    with method.apply(nano().model, text(seed, windows)):
        return perplexity(windows)


@contextmanager
def activated(change: Callable[[int, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Change what every MLP's activation gives: (layer, input, output) to the output.

    For baselines that are no method.
    """
    layers: Any = nano().model.model.layers
    handles = []

    def hook(index: int) -> Any:
        def leave(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return change(index, args[0], out)

        return leave

    try:
        for index, layer in enumerate(layers):
            handles.append(layer.mlp.act_fn.register_forward_hook(hook(index)))
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def at_most(
    better: str, worse: str, holds: float, weaker: float
) -> Callable[[Sequence[Figures]], Verdict]:
    """Verdict on the means: ``better <= limit * worse``."""

    def check(figures: Sequence[Figures]) -> Verdict:
        ratio = mean(figures, better) / mean(figures, worse)
        if ratio <= holds:
            return Verdict.HOLDS
        return Verdict.WEAKER if ratio <= weaker else Verdict.FAILS

    return check


def worst(*verdicts: Verdict) -> Verdict:
    """The worst of several verdicts."""
    order = (Verdict.FAILS, Verdict.WEAKER, Verdict.HOLDS)
    return next(v for v in order if v in verdicts)
