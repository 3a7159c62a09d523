"""RigL: growing where the gradient is large beats growing at random beats not moving."""

from collections.abc import Sequence

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.digits import accuracy, mlp, train, trained
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.set import SET

__all__ = ["CLAIMS"]


def _order(seed: int) -> Figures:
    """Accuracy of RigL, SET and a static mask after equally many updates; drift of RigL's count."""
    steps = 600
    values = {"sparsity": 0.95, "allocation": "erk", "steps": steps, "seed": seed}
    net = mlp(seed)
    counts: set[int] = set()
    train(
        net,
        RigL(**values, every=30),
        seed,
        steps,
        watch=lambda s: counts.add(sum(s.kept().values())),
    )
    return {
        "rigl": accuracy(net)["accuracy"],
        "set": trained(SET(**values, every=30), seed, steps)["accuracy"],
        "static": trained(RandomPruning(**values), seed, steps)["accuracy"],
        "counts": float(len(counts)),
    }


def _order_check(runs: Sequence[Figures]) -> Verdict:
    if any(f["counts"] != 1 for f in runs):
        return Verdict.FAILS
    rigl, set_, static = (mean(runs, name) for name in ("rigl", "set", "static"))
    if rigl >= set_ >= static:
        return Verdict.HOLDS
    return Verdict.WEAKER if rigl >= static else Verdict.FAILS


def _equal_flops(seed: int) -> Figures:
    """RigL against a static mask that trains as long as RigL's operations allow, and dense."""
    steps = 1500
    rigl = trained(RigL(sparsity=0.9, steps=steps, every=50, seed=seed), seed, steps)
    # Operations of an update are those of the mask: the static training lasts a little longer.
    longer = round(steps * rigl["flops"] / 0.1)
    static = trained(RandomPruning(sparsity=0.9, steps=longer, seed=seed), seed, longer)
    dense = trained(None, seed, steps)
    return {
        "rigl": rigl["accuracy"],
        "static": static["accuracy"],
        "dense": dense["accuracy"],
        "flops": rigl["flops"],
        "ratio": rigl["total"] / static["total"],
    }


def _equal_flops_check(runs: Sequence[Figures]) -> Verdict:
    if any(abs(f["ratio"] - 1.0) > 0.01 for f in runs):
        return Verdict.FAILS
    if all(f["rigl"] > f["static"] for f in runs):
        return Verdict.HOLDS
    return Verdict.WEAKER if mean(runs, "rigl") > mean(runs, "static") else Verdict.FAILS


CLAIMS = (
    Claim(
        name="gradients beat chance",
        sentence="Growing where the gradient is largest trains a better network than growing at "
        "random, and that a better one than a fixed mask; the number of weights never changes.",
        paper="ResNet-50 on ImageNet at 80 %: RigL 74.6 %, SET 72.9 %, static 70.6 % (from memory)",
        experiment="digits, 64-300-100-10 at 95 % sparsity by ERK, 600 updates of SGD, a change "
        "every 30: accuracy of the three",
        run=_order,
        check=_order_check,
        ours="accuracy: RigL {rigl:.1f} %, SET {set:.1f} %, static {static:.1f} %",
    ),
    Claim(
        name="beats static at equal FLOPs",
        sentence="At equal training FLOPs, dense gradients of the mask changes included, RigL is "
        "better than a static random mask.",
        paper="RigL above static at every cost (from memory)",
        experiment="digits, 64-300-100-10 at 90 % sparsity by ERK, 1500 updates of RigL, and "
        "static for as many operations: accuracy",
        run=_equal_flops,
        check=_equal_flops_check,
        ours="accuracy: RigL {rigl:.2f} %, static {static:.2f} % at {flops:.1%} of the operations "
        "of dense ({dense:.2f} %)",
        tier="small",
    ),
)
