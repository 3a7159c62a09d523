"""SR-STE: masks that follow the weights beat a mask that is chosen once."""

from collections.abc import Sequence

from torch import Tensor

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.behind_masks import after, at_random, left_alone, one_shot
from gossamer.core import NM
from gossamer.methods.training.base import Sparsifier
from gossamer.methods.training.sr_ste import SRSTE

__all__ = ["CLAIMS"]

_STEPS = 100


def _flips(pull: float, seed: int) -> Figures:
    """Figures of a training, and the share of mask entries that change at an update: late."""
    last: list[Tensor] = []
    rates: list[float] = []

    def watch(sparsifier: Sparsifier) -> None:
        mask = sparsifier.mask("net.0").clone()
        if last:
            rates.append(float((mask != last.pop()).double().mean()))
        last.append(mask)

    figures = after(SRSTE(pattern=NM(1, 16), steps=_STEPS, pull=pull), seed, watch=watch)
    third = len(rates) // 3
    early, late = sum(rates[:third]) / third, sum(rates[-third:]) / third
    return {**figures, "early": 100 * early, "late": 100 * late}


def _run(seed: int) -> Figures:
    refined, plain = _flips(2e-4, seed), _flips(0.0, seed)
    once, random = one_shot(seed, _STEPS), at_random(seed, _STEPS)
    return {
        "loss": refined["loss"],
        "plain": plain["loss"],
        "once": once["loss"],
        "random": random["loss"],
        "accuracy": refined["accuracy"],
        "accuracy_once": once["accuracy"],
        "dense": left_alone(seed)["loss"],
        "early": refined["early"],
        "late": refined["late"],
        "late_plain": plain["late"],
    }


def _check(runs: Sequence[Figures]) -> Verdict:
    if mean(runs, "loss") > 0.9 * min(mean(runs, "once"), mean(runs, "random")):
        return Verdict.FAILS
    falls = mean(runs, "late") < min(mean(runs, "early"), mean(runs, "late_plain"))
    better = mean(runs, "loss") <= mean(runs, "plain")
    return Verdict.HOLDS if falls and better else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="masks that follow",
        sentence="Training dense weights through an N:M mask chosen anew at every update ends "
        "better than one mask chosen at once; a decay of removed weights steadies the mask and "
        "ends at least as well.",
        paper="ResNet-50 2:4 on ImageNet: 77.0 % with SR-STE, 76.4 % one-shot and retrained "
        "(from memory)",
        experiment="digits, a trained 64-128-64-10 taken to 1:16 by 100 updates of AdamW: loss "
        "with SR-STE, without its decay, with the largest weights' mask kept from the start, with "
        "a random mask; mask entries changed at an update in the first and last third",
        run=_run,
        check=_check,
        ours="loss {loss:.3f} (accuracy {accuracy:.1f} %), {plain:.3f} without decay, {once:.3f} "
        "({accuracy_once:.1f} %) mask kept, {random:.3f} random, {dense:.3f} dense; entries "
        "changed {early:.2f} % early, {late:.2f} % late ({late_plain:.2f} % without decay)",
    ),
)
