"""Calibration on probabilities whose error is known."""

import math

import pytest
import torch

from gossamer.methods.training.bayesian.calibration import (
    calibration_error,
    negative_log_likelihood,
    quality,
)


def test_sure_and_right():
    found = quality(torch.eye(3), torch.arange(3))
    assert found == {"accuracy": 1.0, "ece": 0.0, "nll": 0.0}


def test_sure_and_wrong():
    sure = torch.eye(2)[[0, 0, 0, 0]]
    labels = torch.tensor([0, 1, 1, 1])
    assert calibration_error(sure, labels) == pytest.approx(0.75)


def test_two_bins():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 0, 1])
    # Around 0.9: half are right; around 0.6: all are.
    wanted = 0.5 * (0.9 - 0.5) + 0.5 * (1.0 - 0.6)
    assert calibration_error(probabilities, labels, bins=10) == pytest.approx(wanted)


def test_likelihood():
    probabilities = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    labels = torch.tensor([0, 0])
    wanted = (math.log(2) + math.log(4)) / 2
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(wanted)
    assert math.isfinite(negative_log_likelihood(torch.tensor([[0.0, 1.0]]), torch.tensor([0])))
