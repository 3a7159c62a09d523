"""Difference in means: the baseline of steering, on sentences whose feeling is known."""

from collections.abc import Sequence

import torch

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.control.beds import FEELING_NAMES, feelings, moods, net
from gossamer.claims.features.beds import one_thread
from gossamer.methods.control.base import Affine, Edit, Intervention
from gossamer.methods.control.difference_in_means import DifferenceInMeans
from gossamer.models import templates

__all__ = ["CLAIMS"]


@one_thread()
def _run(seed: int) -> Figures:
    data, neutral = feelings(6, seed), templates.batch("feelings", 64, 700 + seed).corrupted
    sums = {"plain": 0.0, "shown": 0.0, "random": 0.0}
    generator = torch.Generator().manual_seed(seed)
    for feeling in (seed % len(FEELING_NAMES), (seed + 1) % len(FEELING_NAMES)):
        with DifferenceInMeans(target=FEELING_NAMES[feeling], positions="last").apply(
            net(), data
        ) as work:
            (edit,) = work.intervention.edits
            shown = moods(neutral)[0][:, feeling].mean()
        assert isinstance(edit.law, Affine)
        other = torch.randn(edit.law.units, generator=generator)
        other *= edit.law.shift.norm() / other.norm()
        with Intervention((Edit(edit.path, Affine.added(other)),), 1.0, "last").on(net()):
            random = moods(neutral)[0][:, feeling].mean()
        plain = moods(neutral)[0][:, feeling].mean()
        for key, value in (("plain", plain), ("shown", shown), ("random", random)):
            sums[key] += float(value) / 2
    return sums


def _check(runs: Sequence[Figures]) -> Verdict:
    gain = mean(runs, "shown") - max(mean(runs, "plain"), mean(runs, "random"))
    return Verdict.HOLDS if gain >= 0.3 else Verdict.WEAKER if gain > 0.05 else Verdict.FAILS


CLAIMS = (
    Claim(
        name="a difference of means steers",
        sentence="Adding the difference of two groups' mean activations makes a model behave as "
        "on the second group.",
        paper="steers Llama 2 on all seven behaviours tried (quoted from memory)",
        experiment="packaged model of templated tasks: mean of one feeling's sentences less that "
        "of the others, added to the middle block at the last token of sentences without a "
        "feeling; a random vector of the same length",
        run=_run,
        check=_check,
        ours="probability of the feeling's deeds {shown:.2f}, {plain:.2f} unsteered, "
        "{random:.2f} with a random vector",
    ),
)
