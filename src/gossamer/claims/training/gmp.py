"""GMP: removing weights gradually loses less than removing them at once."""

from collections.abc import Sequence

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.digits import accuracy, mlp, train, trained
from gossamer.core import kept_count
from gossamer.methods.training.base import Sparsifier
from gossamer.methods.training.gmp import GMP
from gossamer.methods.training.random_pruning import RandomPruning

__all__ = ["CLAIMS"]

_STEPS = 300


def _run(seed: int) -> Figures:
    """Gradual, at once with training left, at once at the end, random: equal updates and counts."""
    values = {"sparsity": 0.95, "steps": _STEPS, "seed": seed, "pattern": "layer"}
    gradual = GMP(**values, every=20)
    net = mlp(seed)
    off: list[float] = []

    def watch(sparsifier: Sparsifier) -> None:
        wanted = gradual.sparsity_at(sparsifier.updates)
        kept = sparsifier.kept()
        off.extend(
            abs(kept[layer.name] - kept_count(layer.size, wanted)) for layer in sparsifier.layers
        )

    train(net, gradual, seed, _STEPS, watch=watch)
    early = GMP(**values, every=_STEPS, start=0.745, until=0.75)
    late = GMP(**values, every=_STEPS, start=0.995, until=1.0)
    random = RandomPruning(sparsity=0.95, steps=_STEPS, seed=seed)
    return {
        "gradual": accuracy(net)["accuracy"],
        "early": trained(early, seed, _STEPS)["accuracy"],
        "late": trained(late, seed, _STEPS)["accuracy"],
        "random": trained(random, seed, _STEPS)["accuracy"],
        "off": max(off),
    }


def _check(runs: Sequence[Figures]) -> Verdict:
    if any(f["off"] for f in runs):
        return Verdict.FAILS
    gradual = mean(runs, "gradual")
    if gradual >= max(mean(runs, name) for name in ("early", "late", "random")) + 2.0:
        return Verdict.HOLDS
    return Verdict.WEAKER if gradual >= mean(runs, "late") + 2.0 else Verdict.FAILS


CLAIMS = (
    Claim(
        name="gradual beats at once",
        sentence="Along the cubic curve a network loses less than when all weights go at once, "
        "with or without training afterwards; counts follow the curve exactly.",
        paper="InceptionV3 on ImageNet at 87.5 %: 74.6 of 78.1 % (from memory)",
        experiment="digits, 64-300-100-10 at 95 % sparsity in every layer, 300 updates of SGD: "
        "GMP, all at once after three quarters and after all updates, a static random mask; "
        "largest deviation of a layer's count from the curve",
        run=_run,
        check=_check,
        ours="accuracy: gradual {gradual:.1f} %, at once {early:.1f} % (then trained) and "
        "{late:.1f} % (at the end), random {random:.1f} %",
    ),
)
