"""GraNet: regeneration, its count exactly on the curve, and against static masks at equal cost."""

from collections.abc import Sequence
from statistics import pstdev

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.digits import accuracy, mlp, train, trained
from gossamer.core import Unstructured, kept_count
from gossamer.methods.training.base import Sparsifier
from gossamer.methods.training.gmp import GMP
from gossamer.methods.training.granet import GraNet
from gossamer.methods.training.random_pruning import RandomPruning

__all__ = ["CLAIMS"]


def _against_static(seed: int, steps: int, every: int, sparsity: float) -> Figures:
    """GraNet, and a static mask for as many operations; how far GraNet's count left the curve."""
    method = GraNet(sparsity=sparsity, steps=steps, every=every, seed=seed)
    net = mlp(seed)
    off: list[int] = []
    grown: list[int] = []
    last: dict[str, object] = {}

    def watch(sparsifier: Sparsifier) -> None:
        total = sum(layer.size for layer in sparsifier.layers)
        # The start is random per layer, so its count is off by a rounding of each.
        wanted = kept_count(total, method.sparsity_at(sparsifier.updates))
        started = sparsifier.updates >= every
        off.append(abs(sum(sparsifier.kept().values()) - wanted) if started else 0)
        mask = sparsifier.mask("0")
        if "mask" in last:
            grown.append(int((mask & ~last["mask"]).sum()))  # type: ignore[operator]
        last["mask"] = mask.clone()

    sparsifier = train(net, method, seed, steps, watch=watch)
    assert sparsifier is not None
    longer = round(steps * sparsifier.flops.share / (1 - sparsity))
    static = RandomPruning(sparsity=sparsity, steps=longer, seed=seed)
    other = trained(static, seed, longer)
    return {
        "granet": accuracy(net)["accuracy"],
        "static": other["accuracy"],
        "flops": sparsifier.flops.share,
        "ratio": sparsifier.flops.total / other["total"],
        "off": float(max(off)),
        "grown": float(sum(grown)),
    }


def _smoke(seed: int) -> Figures:
    return _against_static(seed, steps=300, every=20, sparsity=0.95)


def _small(seed: int) -> Figures:
    return {
        **_against_static(seed, steps=1500, every=50, sparsity=0.9),
        "dense": trained(None, seed, 1500)["accuracy"],
    }


def _static_check(runs: Sequence[Figures]) -> Verdict:
    if any(f["off"] or not f["grown"] or abs(f["ratio"] - 1.0) > 0.01 for f in runs):
        return Verdict.FAILS
    if all(f["granet"] > f["static"] for f in runs):
        return Verdict.HOLDS
    return Verdict.WEAKER if mean(runs, "granet") > mean(runs, "static") else Verdict.FAILS


def _regeneration(seed: int) -> Figures:
    """GraNet from dense, and the same schedule without regeneration."""
    steps = 1500
    figures: dict[str, float] = {}
    for percent, sparsity in ((95, 0.95), (98, 0.98), (995, 0.995)):
        values = {"sparsity": sparsity, "steps": steps, "every": 50, "seed": seed}
        granet = GraNet(**values, initial=0.0)
        gmp = GMP(**values, pattern=Unstructured("model"), start=granet.start, until=granet.until)
        figures[f"granet_{percent}"] = trained(granet, seed, steps)["accuracy"]
        figures[f"gmp_{percent}"] = trained(gmp, seed, steps)["accuracy"]
    return figures


def _regeneration_check(runs: Sequence[Figures]) -> Verdict:
    gains = [mean(runs, f"granet_{p}") - mean(runs, f"gmp_{p}") for p in (95, 98)]
    if min(gains) >= 0.0:
        return Verdict.HOLDS
    spread = max(pstdev(f[f"granet_{p}"] - f[f"gmp_{p}"] for f in runs) for p in (95, 98))
    return Verdict.WEAKER if min(gains) >= -spread else Verdict.FAILS


CLAIMS = (
    Claim(
        name="follows the curve",
        sentence="Pruning and regenerating from half of the weights, GraNet keeps exactly what the "
        "cubic curve says and beats a static random mask at equal training FLOPs.",
        paper="algorithm 1; first sparse-to-sparse training above dense-to-sparse ones",
        experiment="digits, 64-300-100-10 to 95 % sparsity, 300 updates of SGD, a change every 20; "
        "a static mask by ERK for as many operations",
        run=_smoke,
        check=_static_check,
        ours="accuracy {granet:.1f} %, static {static:.1f} %, both at {flops:.1%} of the "
        "operations of dense; count off by {off:.0f}, {grown:.0f} weights of layer 1 regenerated",
    ),
    Claim(
        name="beats static at equal FLOPs",
        sentence="At 90 % sparsity and equal training FLOPs GraNet is better than a static random "
        "mask.",
        paper="ResNet-50 on ImageNet: above dense-to-sparse training at equal time (abstract)",
        experiment="digits, 64-300-100-10 to 90 % sparsity, 1500 updates; a static mask by ERK for "
        "as many operations: accuracy",
        run=_small,
        check=_static_check,
        ours="accuracy: GraNet {granet:.2f} %, static {static:.2f} % at {flops:.1%} of the "
        "operations of dense ({dense:.2f} %)",
        tier="small",
    ),
    Claim(
        name="regeneration helps",
        sentence="With the same schedule, pruning that also regenerates ends at least as well as "
        "gradual pruning alone.",
        paper="regeneration boosts every gradual pruning it was added to (§5)",
        experiment="digits, 64-300-100-10 from dense to 95, 98 and 99.5 % sparsity, 1500 updates: "
        "GraNet against GMP with the same curve and competition; the verdict is of 95 and 98 %",
        run=_regeneration,
        check=_regeneration_check,
        ours="GraNet and GMP: {granet_95:.2f} and {gmp_95:.2f} % at 95 %, {granet_98:.2f} and "
        "{gmp_98:.2f} % at 98 %, {granet_995:.2f} and {gmp_995:.2f} % at 99.5 %",
        tier="small",
    ),
)
