"""What claims of N:M training share: a classifier trained densely, and trained on with few weights.

The digits of scikit-learn; a perceptron that computes its loss itself, so that a dense teacher can
join; AdamW whose rate falls linearly.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.claims.base import Figures
from gossamer.claims.training.digits import accuracy, images, mlp
from gossamer.core import parse_pattern
from gossamer.methods.training.base import SparseTraining, Sparsifier
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.sr_ste import SRSTE

__all__ = ["PATTERN", "Classifier", "after", "at_random", "dense", "left_alone", "one_shot"]

PATTERN = "1:16"
_WIDTHS = (64, 128, 64, 10)


class Classifier(nn.Module):
    """A perceptron that returns logits, and a loss where it is given labels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = mlp(seed, _WIDTHS)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        """Logits (B, 10)."""
        logits = self.net(x)
        loss = None if labels is None else cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def _train(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    seed: int,
    steps: int,
    lr: float,
    after_update: Callable[[], Any],
) -> None:
    x, y = images()
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1.0 - step / steps)
        model(x[rows], labels=y[rows]).loss.backward()
        optimizer.step()
        after_update()
        optimizer.zero_grad()


@cache
def _dense(seed: int) -> Classifier:
    model = Classifier(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    _train(model, optimizer, seed, 200, 3e-3, lambda: None)
    return model


def dense(seed: int) -> Classifier:
    """A copy of the densely trained network, 200 updates."""
    return deepcopy(_dense(seed))


def after(
    method: SparseTraining,
    seed: int,
    *,
    lr: float = 3e-3,
    watch: Callable[[Sparsifier], None] | None = None,
    start: Classifier | None = None,
) -> Figures:
    """Train the dense network on by a method, for its ``steps``.

    Parameters
    ----------
    start : another network to begin with. watch : called after every update.

    Returns
    -------
    Accuracy in percent and loss on the test half: as the training left the network (``unpruned``)
    and once what is outside the pattern is gone; ``left``, what of it was left before; ``flops``.
    """
    model = dense(seed) if start is None else start
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    sparsifier = method.attach(model, optimizer)

    def after_update() -> None:
        sparsifier.step()
        if watch is not None:
            watch(sparsifier)

    _train(model, optimizer, seed + 100, method.steps, lr, after_update)
    before = accuracy(model.net)
    left = getattr(sparsifier, "left_over", lambda: 0.0)()
    flops = sparsifier.flops.share
    work = sparsifier.finish()
    for layer in work.layers:
        method.pattern.check(work.selection(layer.name))
        weight = layer.view(model.get_parameter(layer.parameter))
        assert not weight[~work.selection(layer.name).mask()].any()
    figures = accuracy(model.net)
    return {
        "accuracy": figures["accuracy"],
        "loss": figures["loss"],
        "unpruned": before["loss"],
        "left": left,
        "flops": flops,
    }


def one_shot(seed: int, steps: int, pattern: str = PATTERN, lr: float = 3e-3) -> Figures:
    """Magnitude N:M at once, then as many updates under that mask."""
    # A mask that is never chosen anew: what is removed has no way back.
    return after(
        SRSTE(pattern=parse_pattern(pattern), steps=steps, pull=0.0, every=steps + 1), seed, lr=lr
    )


def at_random(seed: int, steps: int, pattern: str = PATTERN) -> Figures:
    """A random N:M mask, then as many updates under it."""
    return after(RandomPruning(pattern=parse_pattern(pattern), steps=steps, seed=seed), seed)


def left_alone(seed: int) -> Figures:
    """The dense network."""
    return accuracy(dense(seed).net)
