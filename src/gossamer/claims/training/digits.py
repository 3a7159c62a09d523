"""The small classifier that claims of sparse training train: scikit-learn's digits, an MLP."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.claims.base import Figures
from gossamer.methods.training.base import SparseTraining, Sparsifier, StartLoss

__all__ = ["WIDTHS", "accuracy", "images", "mlp", "train", "trained"]

WIDTHS = (64, 300, 100, 10)


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels and labels, test pixels and labels; half of the images each."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32) / 16.0
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    half = len(x) // 2
    train, test = order[:half], order[half:]
    return x[train], y[train], x[test], y[test]


def images() -> tuple[Tensor, Tensor]:
    """Pixels and labels of the training half."""
    x, y, _, _ = _digits()
    return x, y


def mlp(seed: int, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """A perceptron with ReLU, its start fixed by the seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def accuracy(net: nn.Module) -> Figures:
    """Accuracy in percent and loss on the other half of the images."""
    _, _, x, y = _digits()
    found = net(x)
    right = 100 * float((found.argmax(1) == y).double().mean())
    return {"accuracy": right, "loss": float(cross_entropy(found, y))}


def train(
    net: nn.Module,
    method: SparseTraining | Callable[[nn.Module, Any], Sparsifier] | None,
    seed: int,
    steps: int,
    *,
    lr: float = 0.1,
    loss: StartLoss | None = None,
    watch: Callable[[Sparsifier], None] | None = None,
    dense: int = 0,
) -> Sparsifier | None:
    """Train with SGD whose rate falls linearly; dense without a method.

    What was rewound goes on with the rate and the batch of its update.

    Parameters
    ----------
    method : or what attaches one to a network and an optimizer.
    loss : what methods take that score the network before training.
    watch : called after every update.
    dense : updates before the method is attached.
    """
    x, y, _, _ = _digits()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    sparsifier: Sparsifier | None = None
    generator = torch.Generator().manual_seed(seed)
    first = 0
    for step in range(steps):
        if step == dense and method is not None:
            if isinstance(method, SparseTraining):
                sparsifier = method.attach(net, optimizer, loss=loss)
            else:
                sparsifier = method(net, optimizer)
            first = sparsifier.updates
        rows = torch.randint(len(x), (64,), generator=generator)
        if step < first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - step / steps)
        cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()
            if watch is not None:
                watch(sparsifier)
        optimizer.zero_grad()
    if sparsifier is not None:
        sparsifier.remove()
    return sparsifier


def trained(
    method: SparseTraining | None, seed: int, steps: int, widths: Sequence[int] = WIDTHS
) -> Figures:
    """Accuracy, loss, and operations over those of a dense training of as many updates."""
    net = mlp(seed, widths)
    sparsifier = train(net, method, seed, steps)
    share = 1.0 if sparsifier is None else sparsifier.flops.share
    total = 0.0 if sparsifier is None else sparsifier.flops.total
    return {**accuracy(net), "flops": share, "total": total}
