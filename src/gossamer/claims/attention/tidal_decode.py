"""TidalDecode: keys chosen in two layers serve the others, head by head."""

from collections.abc import Sequence

from gossamer.claims.attention.recall_lm import one_thread
from gossamer.claims.attention.retrieval import ask, run_stack, stack
from gossamer.claims.base import Claim, Figures, Verdict
from gossamer.methods.attention.decoding.reuse import ReuseSelector
from gossamer.methods.attention.tidal_decode import tidal_table

__all__ = ["CLAIMS"]

GROUPS, KEPT = (5, 3), 64
FIRST, CORRECTION = 2, 5


@one_thread()
def run(seed: int) -> Figures:
    layers = stack(seed, GROUPS)

    def under(correction: int | None, order: Sequence[int] | None = None) -> tuple[float, float]:
        table = tidal_table(len(layers), FIRST, correction)
        return run_stack(layers, ReuseSelector(table, None, KEPT), order)

    tidal, full = under(CORRECTION)
    return {
        "dense": sum(ask(layer, None)[0] for layer in layers) / len(layers),
        "tidal": tidal,
        "full_layers": full * len(layers),
        "uncorrected": under(None)[0],
        "other_heads": under(CORRECTION, order=(1, 0))[0],
    }


def check(figures: Sequence[Figures]) -> Verdict:
    if any(f["full_layers"] != FIRST + 2 for f in figures):
        return Verdict.FAILS
    lost = min(f["tidal"] - f[name] for f in figures for name in ("uncorrected", "other_heads"))
    kept = all(f["tidal"] >= 0.95 * f["dense"] for f in figures)
    if lost <= 0.0:
        return Verdict.FAILS
    return Verdict.HOLDS if kept and lost >= 0.05 else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="two choosing layers serve the others",
        sentence="Keys chosen in an early layer and once more in the middle answer as all keys do; "
        "without the second choice, or with the heads' choices exchanged, answers are lost.",
        paper="needle test right at 10K and 100K tokens with 128 keys, Llama-3-8B-Gradient-1M",
        experiment="8 planted layers that look for one place up to layer 4 and another from layer "
        f"5, 1024 keys, {KEPT} chosen, all keys read in layers 0, 1, {FIRST} and {CORRECTION}; "
        "a trained model is not asked: layers of the packaged one do not agree",
        run=run,
        check=check,
        ours="right {tidal:.3f} of {dense:.3f} dense with {full_layers:.0f} of 8 layers full; "
        "{uncorrected:.3f} without the correction, {other_heads:.3f} with heads exchanged",
    ),
)
