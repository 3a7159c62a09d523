"""Claim: a sentence of a paper, scaled down and executable.

A claim module ``claims/<family>/<key>.py`` holds ``CLAIMS``, a tuple. A claim's experiment
takes a seed and returns the figures it measured; ``check`` turns the figures of all seeds into
a verdict. It must fail for a stub: every experiment carries the baseline or ablation it beats.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

__all__ = ["Claim", "Figures", "Tier", "Verdict", "mean"]

Tier = Literal["smoke", "small", "gpu"]
Figures = Mapping[str, float]


class Verdict(StrEnum):
    """How a claim came out."""

    HOLDS = "holds"
    WEAKER = "weaker"
    FAILS = "fails"
    NOT_TESTABLE = "not testable here"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One executable sentence.

    Parameters
    ----------
    name : short and unique within its method, such as ``"beats magnitude"``.
    sentence : what the paper says, in our words.
    paper : the paper's own figure with its setting.
    experiment : what is done here instead, in one sentence.
    run : seed to measured figures (plain floats).
    check : figures of every seed to a verdict.
    ours : which measured figures to print beside the paper's: text with ``{name}`` fields, filled
        with the mean over seeds.
    tier : ``smoke`` (CPU, seconds, in CI), ``small`` (CPU, at most 3 minutes), ``gpu`` (at most 5).
    seeds : 3 for every comparison that has noise.
    portable : whether it says as much about any language model, so that ``gossamer claim --model``
        can run it there; ``experiment`` then names the model as ``{model}``.
    """

    name: str
    sentence: str
    paper: str
    experiment: str
    run: Callable[[int], Figures]
    check: Callable[[Sequence[Figures]], Verdict]
    ours: str
    tier: Tier = "smoke"
    seeds: tuple[int, ...] = (0, 1, 2)
    portable: bool = False


def mean(figures: Sequence[Figures], name: str) -> float:
    """Mean of one figure over the seeds."""
    return sum(f[name] for f in figures) / len(figures)
