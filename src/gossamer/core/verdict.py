"""Paired verdicts: is what was made sparse no worse than dense, on the same samples?

A paired bootstrap tests "it loses at least the margin"; Holm's correction accounts for how many
such tests are made together.
Shapes: N = samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite, log

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gossamer.core.budget import check_count
from gossamer.core.errors import GossamerError

__all__ = ["Paired", "check_margin", "holm", "non_inferiority", "samples_needed"]

LEAST = 5
"""Samples below which a bootstrap says nothing."""


@dataclass(frozen=True)
class Paired:
    """How far a method falls behind dense on the samples both answered.

    Parameters
    ----------
    dense, sparse : mean score of each.
    drop : ``dense - sparse``; negative where the method is better.
    worst : upper confidence bound of the drop, one-sided, uncorrected.
    p_value : of "the drop is at least the margin": small means not inferior.
    margin, samples : of the test.
    """

    dense: float
    sparse: float
    drop: float
    worst: float
    p_value: float
    margin: float
    samples: int


def non_inferiority(
    dense: ArrayLike,
    sparse: ArrayLike,
    *,
    margin: float = 0.02,
    level: float = 0.05,
    draws: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Paired bootstrap of the mean difference against a margin, one-sided.

    The observed drops are shifted so that their mean is the margin, the edge of the null
    hypothesis; the p-value is the share of resamples at least as favourable as what was seen,
    ``(1 + count) / (1 + draws)``, so it is never 0.

    Equal answers prove no more than their number does. Where scores are 0 or 1 and no sample was
    lost, a bootstrap has nothing to draw from and would pass any margin; the p-value is then at
    least the chance that N samples show no loss although a share ``margin`` is lost,
    ``(1 - margin) ** N`` (:func:`samples_needed`).

    Parameters
    ----------
    dense, sparse : (N,) scores of the same samples, higher is better; finite.
    margin : largest drop of the mean that still counts as no worse, above 0.
    level : of the confidence bound ``worst``.
    draws : resamples. seed : of the resampling.

    Raises
    ------
    GossamerError
        If the scores do not pair up, are too few, or the margin is not above 0.
    """
    before, after = _scores(dense), _scores(sparse)
    if before.shape != after.shape:
        raise GossamerError(
            f"{len(before)} dense scores and {len(after)} sparse ones; both models must answer "
            "the same samples"
        )
    if len(before) < LEAST:
        raise GossamerError(
            f"{len(before)} samples are too few for a verdict; give at least {LEAST}"
        )
    check_margin(margin)
    check_count("draws", draws, 1)
    drops = before - after
    mean = float(drops.mean())
    resampled = _means(drops, draws, seed)
    # Under the null hypothesis the drops have mean `margin`: shift, do not rescale.
    as_good = resampled - mean + margin <= mean
    p_value = (1 + int(as_good.sum())) / (1 + draws)
    if set(np.unique([before, after]).tolist()) <= {0.0, 1.0} and not (drops > 0).any():
        p_value = max(p_value, (1.0 - min(margin, 1.0)) ** len(drops))
    return Paired(
        dense=float(before.mean()),
        sparse=float(after.mean()),
        drop=mean,
        worst=float(np.quantile(resampled, 1.0 - level)),
        p_value=float(p_value),
        margin=margin,
        samples=len(drops),
    )


def samples_needed(margin: float, *, level: float = 0.05, tests: int = 1) -> int:
    """How many samples a task needs so that equal answers pass, however many tests are made.

    >>> samples_needed(0.02), samples_needed(0.02, tests=14)
    (149, 279)
    """
    margin = min(check_margin(margin), 1.0 - 1e-9)
    return max(LEAST, ceil(log(level / max(1, tests)) / log(1.0 - margin)))


def check_margin(margin: float) -> float:
    """The margin as a float, or why it is none."""
    try:
        value = float(margin)
    except (TypeError, ValueError):
        value = -1.0
    if not isfinite(value) or not 0 < value < 1e6:
        raise GossamerError(
            f"margin is {margin!r}; give the loss of score that is acceptable, above 0, as 0.02"
        )
    return value


def _scores(values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).argmax())
        raise GossamerError(f"score {bad} is {scores[bad]}; a verdict needs finite scores")
    return scores


def _means(drops: NDArray[np.float64], draws: int, seed: int) -> NDArray[np.float64]:
    """(draws,) means of resamples of the drops, made in bounded memory."""
    generator = np.random.default_rng(seed)
    # Resampling counts of distinct values is the same as resampling samples, and much smaller.
    levels, counts = np.unique(drops, return_counts=True)
    if len(levels) <= 64:
        drawn = generator.multinomial(len(drops), counts / len(drops), size=draws)
        return drawn @ levels / len(drops)
    out = np.empty(draws)
    step = max(1, (1 << 22) // len(drops))
    for low in range(0, draws, step):
        high = min(low + step, draws)
        pick = generator.integers(0, len(drops), size=(high - low, len(drops)))
        out[low:high] = drops[pick].mean(axis=1)
    return out


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values adjusted for how many hypotheses were tried.

    The i-th smallest of m is multiplied by m - i + 1, and none may be below a smaller one's.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=np.float64)
    if values.size and not ((values >= 0) & (values <= 1)).all():
        raise GossamerError(f"p-values lie between 0 and 1; got {list(p_values)}")
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(np.minimum(values[order] * factors, 1.0))
    return [float(p) for p in adjusted]
