"""How far predicted probabilities can be believed."""

import torch
from torch import Tensor

__all__ = ["calibration_error", "negative_log_likelihood", "quality"]


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |confidence - accuracy| in bins of equal width, by their size.

    Parameters
    ----------
    probabilities : (N, C), rows sum to 1. labels : int64, (N,).
    """
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    index = (confidence * bins).ceil().clamp(1, bins).long() - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right - confidence)
    return float(gaps.abs().sum() / len(labels))


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean of -log of the probability given to the label, in nats."""
    given = probabilities.double().gather(1, labels[:, None])
    return float(-given.clamp_min(torch.finfo(torch.float32).tiny).log().mean())


def quality(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, ``ece`` and ``nll``."""
    right = probabilities.argmax(1) == labels
    return {
        "accuracy": float(right.double().mean()),
        "ece": calibration_error(probabilities, labels),
        "nll": negative_log_likelihood(probabilities, labels),
    }
