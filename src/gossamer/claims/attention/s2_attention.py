"""S2-Attention: offsets of their own let the heads together recall what one offset hides."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Literal

from gossamer.claims.attention.recall_lm import answered, facts, one_thread, recall_model
from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.methods.attention.s2_attention import S2Attention, coverage
from gossamer.models.fit import fit

__all__ = ["CLAIMS"]

COUNT, BLOCK, LOCAL, STRIDE, HEADS, BATCH = 16, 2, 1, 4, 4, 16
Offsets = Literal["heterogeneous", "homogeneous", "local"]


@cache
def run(seed: int, *, layers: int, steps: int, arms: tuple[Offsets, ...]) -> Figures:
    """Share of the questions answered after training from scratch, dense and under each pattern."""
    train, test = facts(BATCH * steps, 1 + seed, COUNT), facts(128, 10_000 + seed, COUNT)
    figures: dict[str, float] = {}
    with one_thread():
        for offsets in arms:
            # A dense mask computes the same as blocks do, faster at so short a length.
            method = S2Attention(
                block=BLOCK,
                local=LOCAL,
                stride=STRIDE,
                offsets=offsets,
                dense_every=0,
                steps=steps,
                lr=5e-3,
                batch_size=BATCH,
                seed=seed,
                backend="masked",
            )
            model = recall_model(seed, layers=layers, count=COUNT)
            if offsets == "heterogeneous":
                fit(model, train, method.training())
                figures["dense"] = answered(model, test)
                model = recall_model(seed, layers=layers, count=COUNT)
            with method.apply(model, train) as work:
                figures[offsets] = answered(model, test)
                figures[f"{offsets}_sparsity"] = work.report().sparsity
                figures[f"{offsets}_coverage"] = coverage(HEADS, STRIDE, offsets)
    return figures


def check(figures: Sequence[Figures]) -> Verdict:
    ours, dense = mean(figures, "heterogeneous"), mean(figures, "dense")
    controls = max(mean(figures, n) for n in ("homogeneous", "local") if n in figures[0])
    if dense < 0.9:
        return Verdict.NOT_TESTABLE
    if ours <= controls:
        return Verdict.FAILS
    return Verdict.HOLDS if ours >= 0.95 * dense and controls <= ours - 0.1 else Verdict.WEAKER


SENTENCE = (
    "Trained from scratch, heads that each read another share of the far blocks recall what full "
    "attention recalls; with one share for all heads, or local blocks alone, they do not."
)
PAPER = "perfect needle retrieval at 32k tokens with heterogeneous sharding (quoted from memory)"
OURS = (
    "{heterogeneous:.3f} of the questions answered at sparsity {heterogeneous_sparsity:.3f}, dense "
    "{dense:.3f}; one offset for all heads {homogeneous:.3f} at {homogeneous_sparsity:.3f}"
)

CLAIMS = (
    Claim(
        name="own offsets recall, in brief",
        sentence=SENTENCE,
        paper=PAPER,
        experiment="a Llama of one layer and four heads trained for 220 updates to recall 16 facts "
        "of one token each; blocks of 2, one local, stride 4: at least 0.95 of dense, and 10 "
        "points above one offset for all heads",
        run=partial(run, layers=1, steps=220, arms=("heterogeneous", "homogeneous")),
        check=check,
        ours=OURS,
        seeds=(0,),
    ),
    Claim(
        name="own offsets recall",
        sentence=SENTENCE,
        paper=PAPER,
        experiment="a Llama of two layers and four heads trained for 700 updates to recall 16 "
        "facts of one token each; blocks of 2, one local, stride 4: at least 0.95 of dense, and "
        "10 points above both controls",
        run=partial(run, layers=2, steps=700, arms=("heterogeneous", "homogeneous", "local")),
        check=check,
        ours=OURS + ", local blocks {local:.3f} at {local_sparsity:.3f}",
        tier="small",
    ),
)
