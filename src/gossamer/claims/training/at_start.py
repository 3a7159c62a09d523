"""What claims of pruning before training share: the network, its loss, the sanity checks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.training.digits import accuracy, images, mlp, train, trained
from gossamer.methods.training.at_start.sanity import sanity_checks
from gossamer.methods.training.at_start.scored import AtStart
from gossamer.methods.training.base import Sparsifier
from gossamer.methods.training.random_pruning import RandomPruning

__all__ = ["flow_of_ones", "kept", "loss_on_images", "score_claims"]


def loss_on_images(net: nn.Module) -> Tensor:
    """Loss of the untrained network on 256 training images."""
    x, y = images()
    return cross_entropy(net(x[:256]), y[:256])


def flow_of_ones(net: nn.Module) -> Tensor:
    """Sum of the outputs for ones."""
    return net(torch.ones(1, 64, dtype=torch.float64)).sum()


def kept(method: AtStart, seed: int, loss: Callable[[nn.Module], Tensor]) -> dict[str, int]:
    """Weights every layer keeps of an untrained network."""
    net = mlp(seed)
    sparsifier = method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), loss=loss)
    sparsifier.remove()
    return sparsifier.kept()


def beats_random(
    seed: int, cls: type[AtStart], loss: Callable[[nn.Module], Tensor], steps: int
) -> Figures:
    """Accuracy at 98 % sparsity: the method, random with equal shares, the method inverted."""
    values = {"sparsity": 0.98, "steps": steps, "seed": seed}
    figures: dict[str, float] = {}
    for name, invert in (("method", False), ("inverted", True)):
        net = mlp(seed)
        sparsifier = train(net, cls(**values, invert=invert), seed, steps, loss=loss)
        assert sparsifier is not None
        total = sum(layer.size for layer in sparsifier.layers)
        figures[name] = accuracy(net)["accuracy"]
        figures["off"] = abs(sum(sparsifier.kept().values()) - round(0.02 * total))
    random = RandomPruning(**values, allocation="uniform")
    figures["random"] = trained(random, seed, steps)["accuracy"]
    return figures


def beats_random_check(runs: Sequence[Figures]) -> Verdict:
    """The method beats random masks of uniform shares, and its own inverse, with exact counts."""
    if any(f["off"] for f in runs):
        return Verdict.FAILS
    found = mean(runs, "method")
    if found > max(mean(runs, "random"), mean(runs, "inverted")):
        return Verdict.HOLDS
    return Verdict.WEAKER if found > mean(runs, "random") else Verdict.FAILS


def sanity(
    seed: int, cls: type[AtStart], loss: Callable[[nn.Module], Tensor], steps: int = 1500
) -> Figures:
    """Accuracy at 95 % sparsity: masks as found, shuffled in layers, weights anew, inverted."""

    def run(net: nn.Module, attach: Callable[[nn.Module, Any], Sparsifier]) -> float:
        train(net, attach, seed, steps)
        return accuracy(net)["accuracy"]

    method = cls(sparsity=0.95, steps=steps, seed=seed)
    figures = sanity_checks(method, partial(mlp), run, loss=loss, seed=seed)
    return {name.replace(" ", "_"): value for name, value in figures.items()}


def _sanity_check(runs: Sequence[Figures]) -> Verdict:
    found, inverted = mean(runs, "found"), mean(runs, "inverted")
    if found <= inverted:
        return Verdict.FAILS
    # Unspecific to weights: shuffling and new weights cost less than a point.
    same = all(mean(runs, name) > found - 1.0 for name in ("shuffled", "drawn_anew"))
    return Verdict.HOLDS if same else Verdict.WEAKER


def score_claims(
    cls: type[AtStart], loss: Callable[[nn.Module], Tensor], paper: str
) -> tuple[Claim, Claim]:
    """The two claims made of every score: it beats random, and what the sanity checks find.

    Parameters
    ----------
    loss : what the score differentiates. paper : its figure against random.
    """
    return (
        Claim(
            name="beats random",
            sentence="At extreme sparsity a network pruned before training by this score learns "
            "more than a random one, and than one that keeps what the score ranks lowest.",
            paper=paper,
            experiment="digits, 64-300-100-10 at 98 % sparsity, 300 updates of SGD: accuracy with "
            "the score, with random masks of uniform shares, with the score inverted",
            run=partial(beats_random, cls=cls, loss=loss, steps=300),
            check=beats_random_check,
            ours="accuracy {method:.1f} %, random {random:.1f} %, inverted {inverted:.1f} %",
        ),
        Claim(
            name="sanity checks",
            sentence="What the score finds is how many weights each layer keeps, not which: "
            "shuffling masks within layers or drawing the weights anew costs little; inverting "
            "costs much.",
            paper="Frankle et al. (arXiv 2009.08576): true of SNIP, GraSP and SynFlow on CIFAR-10",
            experiment="digits, 64-300-100-10 at 95 % sparsity, 1500 updates of SGD: accuracy",
            run=partial(sanity, cls=cls, loss=loss),
            check=_sanity_check,
            ours="accuracy as found {found:.1f} %, shuffled {shuffled:.1f} %, weights drawn anew "
            "{drawn_anew:.1f} %, inverted {inverted:.1f} %",
            tier="small",
        ),
    )
