"""What claims of pruning before training share: the network, its loss, the sanity checks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.claims.base import Figures, Verdict, mean
from gossamer.claims.training.digits import accuracy, images, mlp, train, trained
from gossamer.methods.training.at_start.sanity import sanity_checks
from gossamer.methods.training.at_start.scored import AtStart
from gossamer.methods.training.base import Sparsifier
from gossamer.methods.training.random_pruning import RandomPruning

__all__ = ["beats_random", "beats_random_check", "flow_of_ones", "kept", "loss_on_images", "sanity"]


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
