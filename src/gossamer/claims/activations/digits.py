"""What the claims on small images share: scikit-learn's digits, split by a seed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ["Split", "calibration_error", "digits", "one_thread"]

_TRAIN = 1297


@dataclass(frozen=True)
class Split:
    """1297 digits to train on, 500 to test on; images (N, 8, 8) with values 0 to 16."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def relabelled(self, share: float, seed: int) -> "Split":
        """A share of the training labels drawn anew, uniformly over the ten classes."""
        generator = torch.Generator().manual_seed(1000 + seed)
        chosen = torch.rand(len(self.y), generator=generator) < share
        labels = self.y.clone()
        labels[chosen] = torch.randint(0, 10, (int(chosen.sum()),), generator=generator)
        return Split(self.x, labels, self.x_test, self.y_test)


@cache
def _images() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 8, 8), torch.tensor(labels)


def digits(seed: int) -> Split:
    """The split of a seed."""
    x, y = _images()
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = mixed[:_TRAIN], mixed[_TRAIN:]
    return Split(x[train], y[train], x[test], y[test])


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error of (N, classes): confidence minus accuracy, in equal bins."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).float()
    error = 0.0
    for index in range(bins):
        inside = (confidence > index / bins) & (confidence <= (index + 1) / bins)
        if bool(inside.any()):
            gap = (right[inside].mean() - confidence[inside].mean()).abs()
            error += float(inside.float().mean() * gap)
    return error


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small run slower on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
