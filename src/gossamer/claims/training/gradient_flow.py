"""Progressive gradient flow: fading weights out beats cutting them, at high sparsity."""

from collections.abc import Sequence

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.behind_masks import Classifier, after
from gossamer.core import NM
from gossamer.methods.training.base import SparseTraining
from gossamer.methods.training.gradient_flow import GradientFlow
from gossamer.methods.training.sr_ste import SRSTE

__all__ = ["CLAIMS"]

_STEPS = 200
_PATTERN = NM(1, 16)


def _run(seed: int) -> Figures:
    def loss(method: SparseTraining) -> float:
        return after(method, seed, start=Classifier(seed))["loss"]

    flow = GradientFlow(pattern=_PATTERN, steps=_STEPS)
    through = GradientFlow(pattern=_PATTERN, steps=_STEPS, straight_through=True)
    never = SRSTE(pattern=_PATTERN, steps=_STEPS, pull=0.0, every=_STEPS + 1)
    last = flow.phases[1] - 1
    return {
        "loss": loss(flow),
        "through": loss(through),
        "sr_ste": loss(SRSTE(pattern=_PATTERN, steps=_STEPS)),
        "kept": loss(never),
        "beta": flow.removed_share(last),
    }


def _check(runs: Sequence[Figures]) -> Verdict:
    loss, through = mean(runs, "loss"), mean(runs, "through")
    kept, rival = mean(runs, "kept"), mean(runs, "sr_ste")
    if max(loss, through) >= 0.95 * kept or mean(runs, "beta") >= 1e-3:
        return Verdict.FAILS
    if loss < rival:
        return Verdict.HOLDS
    return Verdict.WEAKER if through < rival else Verdict.FAILS


CLAIMS = (
    Claim(
        name="fading beats cutting",
        sentence="From scratch and at high N:M sparsity, weights that fade out end in a better "
        "network than SR-STE's hard masks at equal updates.",
        paper="up to 5 % better on language tasks at 1:16 and beyond",
        experiment="digits, an untrained 64-128-64-10 at 1:16, 200 updates of AdamW: loss of "
        "exponential MdGf by the chain rule and straight through (as its code runs), of "
        "SR-STE, of the untrained weights' own mask, which is as good as random",
        run=_run,
        check=_check,
        ours="loss {loss:.3f} by the chain rule, {through:.3f} straight through, "
        "{sr_ste:.3f} SR-STE, {kept:.3f} first mask kept",
    ),
)
