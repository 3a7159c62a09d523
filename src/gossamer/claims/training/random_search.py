"""Random search: it finds masks that start better, and networks that end no better."""

from collections.abc import Sequence
from functools import partial
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.claims.base import Claim, Figures, Verdict
from gossamer.claims.training.digits import accuracy, images, mlp, train, trained
from gossamer.methods.training.random_search import RandomSearch
from gossamer.methods.training.search.searched import Searched

__all__ = ["CLAIMS"]

Space = Literal["node", "weight"]


def _loss(net: nn.Module) -> Tensor:
    """Loss on 256 training images: as much as four batches of the training."""
    x, y = images()
    return cross_entropy(net(x[:256]), y[:256])


def _trained(
    seed: int, steps: int, *, masks: int, draws: int = 50, space: Space = "node"
) -> tuple[Figures, Searched]:
    net = mlp(seed)
    method = RandomSearch(
        sparsity=0.9,
        steps=steps,
        draws=draws,
        sample_batches=4,
        space=space,
        seed=masks,
    )
    sparsifier = train(net, method, seed, steps, loss=_loss)
    assert isinstance(sparsifier, Searched)
    return accuracy(net), sparsifier


def _smaller(net: nn.Sequential, sparsifier: Searched) -> nn.Sequential:
    """The network without its removed hidden units: smaller dense layers."""
    kept = [sparsifier.mask(str(i)).any(1) for i in (0, 2)]
    ins = (torch.ones(64, dtype=torch.bool), *kept)
    outs = (*kept, torch.ones(10, dtype=torch.bool))
    layers: list[nn.Module] = []
    for i, (rows, columns) in enumerate(zip(outs, ins, strict=True)):
        old = net[2 * i]
        assert isinstance(old, nn.Linear)
        new = nn.Linear(int(columns.sum()), int(rows.sum()))
        with torch.no_grad():
            new.weight.copy_(old.weight[rows][:, columns])
            new.bias.copy_(old.bias[rows])
        layers += [new, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _start(seed: int) -> Figures:
    """Losses of the untrained network under 50 draws, and of the chosen one made smaller."""
    figures: dict[str, float] = {}
    for name, trial in (("", 0), ("trial_", 3)):
        net = mlp(seed)
        method = RandomSearch(sparsity=0.9, sample_batches=4, trial_steps=trial, seed=seed)
        sparsifier = method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), loss=_loss)
        assert isinstance(sparsifier, Searched)
        sparsifier.remove()
        losses = torch.tensor(sparsifier.found.losses, dtype=torch.float64)
        figures[f"{name}best"] = sparsifier.found.loss
        figures[f"{name}mean"] = sparsifier.found.mean
        figures[f"{name}std"] = float(losses.std())
        if not trial:
            with torch.no_grad():
                figures["smaller"] = float(_loss(_smaller(net, sparsifier)))
    return figures


def _neutral(seed: int, steps: int, space: Space = "node") -> Figures:
    """Accuracy under the best of 50 masks, under a random one, and dense."""
    best, searched = _trained(seed, steps, masks=seed, space=space)
    # Draws of another seed, so that the random mask is none of those searched.
    random, one = _trained(seed, steps, masks=1000 + seed, draws=1, space=space)
    # As many operations as the searched training took, search included.
    extra = int(searched.search_flops / searched.flops.update(searched.kept()))
    longer, _ = _trained(seed, steps + extra, masks=1000 + seed, draws=1, space=space)
    return {
        "searched": best["accuracy"],
        "random": random["accuracy"],
        "longer": longer["accuracy"],
        "dense": trained(None, seed, steps)["accuracy"],
        "start": searched.found.loss,
        "start_mean": searched.found.mean,
        "share": searched.flops.share,
        "extra": float(extra),
        "off": abs(searched.sparsity - 0.9) + abs(one.sparsity - searched.sparsity),
    }


def _difference(runs: Sequence[Figures]) -> tuple[float, float]:
    """Mean of searched less random over repetitions, and its standard error."""
    gaps = torch.tensor([f["searched"] - f["random"] for f in runs], dtype=torch.float64)
    return float(gaps.mean()), float(gaps.std()) / sqrt(len(gaps))


def _neutral_check(runs: Sequence[Figures]) -> Verdict:
    if any(f["start"] >= f["start_mean"] or f["off"] > 0.005 for f in runs):
        return Verdict.FAILS
    if len(runs) < 2:
        return Verdict.WEAKER
    difference, error = _difference(runs)
    if abs(difference) <= error:
        return Verdict.HOLDS
    return Verdict.WEAKER if abs(difference) <= 2 * error else Verdict.FAILS


def _start_check(runs: Sequence[Figures]) -> Verdict:
    # A network whose units were only half removed computes something else than the smaller one.
    if any(abs(f["smaller"] - f["best"]) > 1e-5 for f in runs):
        return Verdict.FAILS
    # The best of 50 normal draws lies 2.2 deviations below their mean, in 999 of 1000 cases 1.2.
    ahead = all(
        f[f"{name}best"] < f[f"{name}mean"] - 1.2 * f[f"{name}std"]
        for f in runs
        for name in ("", "trial_")
    )
    return Verdict.HOLDS if ahead else Verdict.FAILS


_EXPERIMENT = (
    "digits, 64-300-100-10 at 90 % sparsity, best of 50 {space} masks by the loss on 256 images, "
    "{steps} updates of SGD, 10 repetitions: accuracy less that under a random mask, in standard "
    "errors of the mean; holds within one, weaker within two"
)
_OURS = (
    "accuracy {searched:.2f} %, random {random:.2f} %, random trained as many operations "
    "({extra:.0f} updates more) {longer:.2f} %, dense {dense:.2f} %; loss before training "
    "{start:.4f}, on average {start_mean:.4f}; {share:.1%} of dense operations"
)


def _claim(name: str, sentence: str, steps: int, space: Space) -> Claim:
    return Claim(
        name=name,
        sentence=sentence,
        paper="abstract: networks found by random search neither perform better nor converge more "
        "efficiently than random ones",
        experiment=_EXPERIMENT.format(space=space, steps=steps),
        run=partial(_neutral, steps=steps, space=space),
        check=_neutral_check,
        ours=_OURS,
        tier="small",
        seeds=tuple(range(10)),
    )


CLAIMS = (
    Claim(
        name="finds a better start",
        sentence="Among random sub-networks of whole hidden units, the search finds one with a "
        "lower loss before training, or after a few updates, than they have on average.",
        paper="abstract: sub-networks positioned more advantageously in the loss landscape",
        experiment="digits, 64-300-100-10 at 90 % sparsity, 50 draws, loss on 256 images; the "
        "chosen network made smaller, its units taken out, must have the same loss",
        run=_start,
        check=_start_check,
        ours="loss {best:.4f}, smaller network {smaller:.4f}, mean of the draws {mean:.4f} with "
        "deviation {std:.4f}; after 3 updates {trial_best:.4f}, mean {trial_mean:.4f}",
    ),
    _claim(
        "ends no better",
        "After training, the network that was searched for is no better than a random one of the "
        "same sparsity.",
        1500,
        "node",
    ),
    _claim(
        "learns no faster",
        "Early in training, the network that was searched for is not ahead of a random one.",
        150,
        "node",
    ),
    _claim(
        "no better in weight space",
        "Searching over single weights instead of units is no better than a random mask either.",
        1500,
        "weight",
    ),
)
