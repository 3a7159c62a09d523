"""CAST: what is outside the mask has gone by itself before it is pruned."""

from collections.abc import Sequence
from math import expm1

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.behind_masks import after, at_random, left_alone, one_shot
from gossamer.core import NM
from gossamer.methods.training.ast import AST
from gossamer.methods.training.cast import CAST

__all__ = ["CLAIMS"]

_STEPS = 120
_PULL = 0.1


def _run(seed: int) -> Figures:
    pulled = after(CAST(steps=_STEPS, pull=_PULL), seed)
    free = after(CAST(steps=_STEPS, pull=0.0), seed)
    ast = after(AST(steps=_STEPS), seed)
    once = one_shot(seed, _STEPS, str(NM(2, 4)))
    return {
        "loss": pulled["loss"],
        "left": 100 * pulled["left"],
        "cut": 100 * expm1(pulled["loss"] - pulled["unpruned"]),
        "cut_free": 100 * expm1(free["loss"] - free["unpruned"]),
        "free": free["loss"],
        "ast": ast["loss"],
        "once": once["loss"],
        "random": at_random(seed, _STEPS, str(NM(2, 4)))["loss"],
        "dense": left_alone(seed)["loss"],
        "flops": 100 * pulled["flops"],
        "flops_ast": 100 * ast["flops"],
    }


def _check(runs: Sequence[Figures]) -> Verdict:
    gone = mean(runs, "left") < 1.0 and mean(runs, "cut") < 0.5 and mean(runs, "cut_free") > 10.0
    if not gone or mean(runs, "loss") >= min(mean(runs, "free"), mean(runs, "random")):
        return Verdict.FAILS
    rivals = min(mean(runs, "ast"), mean(runs, "once"))
    return Verdict.HOLDS if mean(runs, "loss") <= rivals else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="pruning costs nothing",
        sentence="At the end of training removed weights are below 1 % of kept ones and pruning "
        "changes perplexity by less than 0.5 %, by 10 % or more without the pull; the 2:4 network "
        "is at least as good as AST's and one-shot's at equal updates.",
        paper="LLaMA2-7B 2:4: perplexity +0.09 after 7.5B tokens",
        experiment="digits, a trained 64-128-64-10 taken to 2:4 by 120 updates of Adam (AdamS with "
        "λ = 0.1): loss with and without the pull, with AST, with the largest weights' mask "
        "kept from the start, with a random mask; change of perplexity by the last pruning",
        run=_run,
        check=_check,
        ours="loss {loss:.3f}, {free:.3f} without pull, {ast:.3f} AST, {once:.3f} one-shot, "
        "{random:.3f} random, {dense:.3f} dense; {left:.2f} % left; pruning adds {cut:.2f} % "
        "perplexity, {cut_free:.1f} % without pull; operations {flops:.0f} % of dense, "
        "AST {flops_ast:.0f} %",
    ),
)
