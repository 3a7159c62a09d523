"""Quiver of arrows: does one more kind of probe help whoever picks the best by validation?

A single probe may win a dataset by luck. So the best of a quiver is picked on training rows, once
without the dictionary's probes and once with them, and only the two picks meet the test rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gossamer.core import GossamerError, unknown
from gossamer.methods.features.measure import Interval
from gossamer.methods.features.probing.folds import auc, folds
from gossamer.methods.features.probing.probes import Probe, Rows

__all__ = ["AMOUNTS", "REGIMES", "Shot", "Task", "draw", "gain", "shoot"]

REGIMES = ("scarcity", "imbalance", "noise", "shift")
AMOUNTS: dict[str, tuple[float, ...]] = {
    "scarcity": tuple(sorted({float(round(2 ** (1 + 9 * i / 19))) for i in range(20)})),
    "imbalance": tuple(round(0.05 * i, 2) for i in range(1, 20)),
    "noise": tuple(round(0.05 * i, 2) for i in range(11)),
    "shift": (0.0,),
}
"""What each regime varies: training rows, share of positives, share of labels flipped, nothing."""


@dataclass(frozen=True, eq=False)
class Task:
    """A question about rows, yes or no.

    Parameters
    ----------
    name : its name. pool : rows to train on, with ``labels`` (N,) bool.
    test, test_labels : rows never trained on.
    shifted, shifted_labels : test rows from elsewhere, or None.
    """

    name: str
    pool: Rows
    labels: Tensor
    test: Rows
    test_labels: Tensor
    shifted: Rows | None = None
    shifted_labels: Tensor | None = None


@dataclass(frozen=True)
class Shot:
    """What the probes of a quiver reached on one task in one setting.

    Parameters
    ----------
    validation, test : AUC by the probe's name. sparse : names that read the dictionary.
    """

    task: str
    regime: str
    amount: float
    validation: dict[str, float]
    test: dict[str, float]
    sparse: frozenset[str] = field(default_factory=frozenset)

    def pick(self, *, sparse: bool) -> str:
        """The probe that validates best; ties go to the first, baselines before latents."""
        names = [n for n in self.validation if sparse or n not in self.sparse]
        return max(names, key=lambda n: self.validation[n])

    @property
    def gain(self) -> float:
        """Test AUC of the pick from all probes above that of the pick from the baselines."""
        return self.test[self.pick(sparse=True)] - self.test[self.pick(sparse=False)]


def draw(
    labels: Tensor, regime: str, amount: float, *, seed: int, size: int = 256
) -> tuple[Tensor, Tensor]:
    """Training rows of a setting: their places in the pool, and the labels shown.

    Both classes are equally frequent but under ``imbalance``, where the rarer class gets at least
    2 rows. Flips take the same share of both classes.

    Parameters
    ----------
    amount : rows for ``scarcity``; share of positives for ``imbalance``; share of labels flipped
        for ``noise``; not read for ``shift``.
    size : rows of the regimes that do not vary it, fewer where a class is smaller.

    Raises
    ------
    GossamerError
        For an unknown regime or a class with fewer rows than asked for.
    """
    if regime not in REGIMES:
        raise unknown("regime", regime, REGIMES)
    share = amount if regime == "imbalance" else 0.5
    places = [labels.nonzero()[:, 0], (~labels).nonzero()[:, 0]]
    wanted = round(amount) if regime == "scarcity" else size
    if regime != "scarcity":
        most = min(len(places[0]) / share, len(places[1]) / (1 - share))
        wanted = min(wanted, int(most))
    first = max(1 if regime == "scarcity" else 2, round(share * wanted))
    counts = (first, max(min(first, 2), wanted - first))
    for part, count, kind in zip(places, counts, ("positive", "negative"), strict=True):
        if len(part) < count:
            raise GossamerError(
                f"{count} {kind} rows wanted for {regime} {amount:g}, {len(part)} there; give "
                "more data or a smaller amount"
            )
    generator = torch.Generator().manual_seed(seed)
    picked, shown = [], []
    for part, count, value in zip(places, counts, (True, False), strict=True):
        picked.append(part[torch.randperm(len(part), generator=generator)[:count]])
        flips = round(amount * count) if regime == "noise" else 0
        # The permutation above is random already: the first ones flip.
        shown.append(torch.tensor([not value] * flips + [value] * (count - flips)))
    return torch.cat(picked), torch.cat(shown)


def shoot(
    task: Task,
    regime: str,
    amount: float,
    baselines: Sequence[Probe],
    sparse: Sequence[Probe],
    *,
    seed: int = 0,
    size: int = 256,
) -> Shot:
    """Train every probe in one setting and test it.

    Raises
    ------
    GossamerError
        If the task lacks the rows the setting needs.
    """
    test, truth = task.test, task.test_labels
    if regime == "shift":
        if task.shifted is None or task.shifted_labels is None:
            raise GossamerError(f"task {task.name!r} has no shifted rows; leave out 'shift'")
        test, truth = task.shifted, task.shifted_labels
    at, shown = draw(task.labels, regime, amount, seed=seed, size=size)
    rows, held = task.pool.at(at), folds(shown, seed)
    validation, tested = {}, {}
    for probe in (*baselines, *sparse):
        fitted = probe.fit(rows, shown, held, seed)
        validation[probe.name] = fitted.validation
        tested[probe.name] = auc(fitted.score(test), truth)
    names = frozenset(probe.name for probe in sparse)
    return Shot(task.name, regime, amount, validation, tested, names)


def gain(shots: Sequence[Shot], *, draws: int = 1000, seed: int = 0) -> Interval:
    """Mean gain of a dictionary in the quiver, with its interval from resampling whole tasks.

    Raises
    ------
    GossamerError
        Without shots.
    """
    if not shots:
        raise GossamerError("no shot was taken; give at least one task and regime")
    by: dict[str, list[float]] = {}
    for shot in shots:
        by.setdefault(shot.task, []).append(shot.gain)
    sums = torch.tensor([sum(g) for g in by.values()], dtype=torch.float64)
    counts = torch.tensor([len(g) for g in by.values()], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(sums), (draws, len(sums)), generator=generator)
    drawn = sums[chosen].sum(1) / counts[chosen].sum(1)
    return Interval.of(float(sums.sum() / counts.sum()), drawn)
