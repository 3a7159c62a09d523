"""SET: masks that move at random end better than masks that stay."""

from collections.abc import Sequence

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.digits import accuracy, mlp, train
from gossamer.methods.training.base import Sparsifier
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.set import SET

__all__ = ["CLAIMS"]

_STEPS = 500


def _run(seed: int) -> Figures:
    """Accuracy of SET and of a static mask of equal shares; the largest change of a count."""
    values = {"sparsity": 0.95, "allocation": "er", "steps": _STEPS, "seed": seed}
    figures: dict[str, float] = {"drift": 0.0, "changes": 0.0}
    moving, still = mlp(seed), mlp(seed)
    counts: list[dict[str, int]] = []
    masks: list[int] = []

    def watch(sparsifier: Sparsifier) -> None:
        counts.append(sparsifier.kept())
        masks.append(hash(bytes(sparsifier.mask("0").flatten().numpy().tobytes())))

    train(moving, SET(**values, every=20), seed, _STEPS, watch=watch)
    train(still, RandomPruning(**values), seed, _STEPS)
    figures["drift"] = float(
        max(abs(now[name] - counts[0][name]) for now in counts for name in now)
    )
    figures["changes"] = float(len(set(masks)))
    figures["set"] = accuracy(moving)["accuracy"]
    figures["static"] = accuracy(still)["accuracy"]
    return figures


def _check(runs: Sequence[Figures]) -> Verdict:
    if any(f["drift"] or f["changes"] < 10 for f in runs):
        return Verdict.FAILS
    return Verdict.HOLDS if mean(runs, "set") >= mean(runs, "static") else Verdict.FAILS


CLAIMS = (
    Claim(
        name="moving beats staying",
        sentence="Replacing the weights closest to zero by random ones trains a better network "
        "than a fixed random mask of the same size.",
        paper="SET-MLP above a fixed sparse MLP on all of its data sets",
        experiment="digits, 64-300-100-10 at 95 % sparsity by ER, 500 updates of SGD, a change "
        "every 20: accuracy of SET and of a static mask; largest change of any layer's count",
        run=_run,
        check=_check,
        ours="accuracy {set:.1f} % with SET, {static:.1f} % static; counts off by {drift:.0f}",
    ),
)
