"""Random pruning: shares per layer matter, positions hardly, and width closes the gap."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.digits import accuracy, mlp, train, trained
from gossamer.methods.training.random_pruning import RandomPruning

__all__ = ["CLAIMS"]

_WIDTHS = (64, 128, 256, 512, 1024)


def _shares(seed: int, sparsity: float = 0.95, steps: int = 500) -> Figures:
    """Accuracy under ERK and uniform masks; whether any mask moved, and the count was exact."""
    figures: dict[str, float] = {"moved": 0.0, "off": 0.0}
    for allocation in ("erk", "uniform"):
        method = RandomPruning(sparsity=sparsity, allocation=allocation, steps=steps, seed=seed)
        net = mlp(seed)
        first: dict[str, torch.Tensor] = {}

        def watch(sparsifier: object, first: dict[str, torch.Tensor] = first) -> None:
            for path, one in sparsifier.held.items():  # type: ignore[attr-defined]
                kept = one.weight.detach() != 0
                before = first.setdefault(path, one.mask.clone())
                figures["moved"] += float((kept & ~before).sum())

        sparsifier = train(net, method, seed, steps, watch=watch)
        assert sparsifier is not None
        total = sum(layer.size for layer in sparsifier.layers)
        kept = sum(sparsifier.kept().values())
        figures["off"] = max(figures["off"], abs(kept - (1 - sparsity) * total))
        figures[allocation] = accuracy(net)["accuracy"]
    return figures


def _shares_check(runs: Sequence[Figures]) -> Verdict:
    if any(f["moved"] or f["off"] > 3 for f in runs):
        return Verdict.FAILS
    erk, uniform = mean(runs, "erk"), mean(runs, "uniform")
    return Verdict.HOLDS if erk > uniform else Verdict.FAILS


def _gap(seed: int) -> Figures:
    """Accuracy that the dense network has over its random sparse one, by width."""
    figures: dict[str, float] = {}
    for width in _WIDTHS:
        widths = (64, width, width, 10)
        dense = trained(None, seed, 600, widths)["accuracy"]
        method = RandomPruning(sparsity=0.9, steps=600, seed=seed)
        figures[f"gap_{width}"] = dense - trained(method, seed, 600, widths)["accuracy"]
    return figures


def _gap_check(runs: Sequence[Figures]) -> Verdict:
    gaps = [mean(runs, f"gap_{width}") for width in _WIDTHS]
    # Within noise: half a point is 4 to 5 of the 899 test images.
    falling = all(wide <= narrow + 0.5 for narrow, wide in pairwise(gaps))
    if falling and gaps[-1] < 0.25 * gaps[0]:
        return Verdict.HOLDS
    return Verdict.WEAKER if gaps[-1] < gaps[0] else Verdict.FAILS


CLAIMS = (
    Claim(
        name="shares of the layers decide",
        sentence="With masks drawn at random and never changed, layer shares by ERK train to a "
        "better network than equal shares.",
        paper="§4: ERK above uniform at every sparsity",
        experiment="digits, 64-300-100-10 at 95 % sparsity, 500 updates of SGD: accuracy under ERK "
        "and uniform random masks; weights ever seen outside the first mask",
        run=_shares,
        check=_shares_check,
        ours="accuracy {erk:.1f} % with ERK, {uniform:.1f} % uniform; {moved:.0f} weights moved",
    ),
    Claim(
        name="shares decide at 98 %",
        sentence="Where hardly any weights are left, the layer shares of a random mask decide "
        "whether the network learns.",
        paper="§4: ERK above uniform, most at high sparsity",
        experiment="digits, 64-300-100-10 at 98 % sparsity, 3000 updates of SGD: accuracy under "
        "ERK and uniform random masks",
        run=lambda seed: _shares(seed, 0.98, 3000),
        check=_shares_check,
        ours="accuracy {erk:.1f} % with ERK, {uniform:.1f} % uniform",
        tier="small",
    ),
    Claim(
        name="width closes the gap",
        sentence="At equal sparsity the gap between a dense network and a randomly pruned one "
        "shrinks as the network grows wider.",
        paper="§4.1: the gap vanishes for wide and deep enough networks",
        experiment="digits, two hidden layers of 64 to 1024 units at 90 % sparsity by ERK, 600 "
        "updates: accuracy of the dense network less that of the sparse one",
        run=_gap,
        check=_gap_check,
        ours="gap in points: {gap_64:.1f} at width 64, {gap_128:.1f} at 128, {gap_256:.1f} at 256, "
        "{gap_512:.1f} at 512, {gap_1024:.1f} at 1024",
        tier="small",
    ),
)
