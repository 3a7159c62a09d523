"""A tiny classifier, and points in three overlapping classes."""

import torch
from torch import Tensor, nn

__all__ = ["broken_labels", "class_scores", "classifier", "labelled"]


def classifier() -> nn.Module:
    """6 inputs, 20 hidden units, 3 classes; always the same weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)).eval()


def labelled(samples: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(samples, 6) points around three centres, and which centre."""
    centres = 1.5 * torch.randn(3, 6, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    return centres[labels] + torch.randn(samples, 6, generator=generator), labels


def broken_labels() -> tuple[Tensor, Tensor]:
    """Of classes that the model does not have."""
    points, labels = labelled()
    return points, labels + 7


def class_scores(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(labelled(16, seed=1)[0])
