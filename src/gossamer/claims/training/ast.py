"""AST: masks that adapt beat masks that stay under the same training, and SLoRB adds to it."""

from collections.abc import Sequence

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.behind_masks import after, at_random, left_alone, one_shot
from gossamer.core import NM
from gossamer.methods.training.ast import AST

__all__ = ["CLAIMS"]

_STEPS = 100
_PATTERN = NM(1, 16)


def _run(seed: int) -> Figures:
    adaptive = after(AST(pattern=_PATTERN, steps=_STEPS), seed)
    fixed = after(AST(pattern=_PATTERN, steps=_STEPS, every=_STEPS + 1), seed)
    boosted = after(AST(pattern=_PATTERN, steps=_STEPS, slorb=16), seed)
    return {
        "loss": adaptive["loss"],
        "fixed": fixed["loss"],
        "boosted": boosted["loss"],
        "once": one_shot(seed, _STEPS)["loss"],
        "random": at_random(seed, _STEPS)["loss"],
        "dense": left_alone(seed)["loss"],
    }


def _check(runs: Sequence[Figures]) -> Verdict:
    loss, fixed, boosted = (mean(runs, name) for name in ("loss", "fixed", "boosted"))
    if loss >= 0.95 * min(fixed, mean(runs, "once"), mean(runs, "random")):
        return Verdict.FAILS
    return Verdict.HOLDS if boosted < loss else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="adaptive and boosted",
        sentence="Masks chosen anew while training end better than the first mask kept under the "
        "same training and teacher; SLoRB's small branch makes it better still.",
        paper="GPT-2 124M on WikiText, 2:4: perplexity 32.2 with AST, 31.1 boosted, 29.95 dense, "
        "50.1 SparseGPT",
        experiment="digits, a trained 64-128-64-10 taken to 1:16 by 100 updates of Adam: loss with "
        "AST, with its first mask kept, with SLoRB of 16 inputs a block; one-shot and a random "
        "mask without a teacher",
        run=_run,
        check=_check,
        ours="loss {loss:.3f}, {fixed:.3f} first mask kept, {boosted:.3f} with SLoRB, {once:.3f} "
        "one-shot, {random:.3f} random, {dense:.3f} dense",
    ),
)
