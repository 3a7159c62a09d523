"""Worked arrays for the scores of activation, attention, curvature, gradient and chance."""

import pytest
import torch

from gossamer.core.scores import (
    attention_mass,
    channel_magnitude,
    fisher,
    obs_saliency,
    outlier_share,
    positional_window,
    taylor,
    uniform_random,
    weight_times_input,
    weighted_channel,
)

W = torch.tensor([[1.0, -2.0], [0.0, 3.0]])


def test_weight_times_input_is_by_column():
    assert weight_times_input(W, torch.tensor([2.0, 0.5])).tolist() == [[2.0, 1.0], [0.0, 1.5]]
    assert weight_times_input(W.bfloat16(), torch.ones(2)).dtype == torch.float32


def test_weight_times_input_does_not_change_when_channels_are_rescaled():
    factor = torch.tensor([32.0, 1.0])
    norm = torch.tensor([1.5, 2.5])
    assert torch.equal(weight_times_input(W / factor, norm * factor), weight_times_input(W, norm))


def test_channels():
    x = torch.tensor([[-1.0, 2.0]])
    assert channel_magnitude(x).tolist() == [[1.0, 2.0]]
    assert weighted_channel(x, torch.tensor([3.0, 0.5])).tolist() == [[3.0, 1.0]]


def test_outlier_share_counts_what_exceeds_a_multiple_of_the_mean():
    scores = torch.tensor([[1.0, 1.0], [1.0, 9.0]])  # mean 3
    assert outlier_share(scores, 2.0) == 0.25
    assert outlier_share(scores, 3.0) == 0.0
    assert outlier_share(torch.ones(5), 1.0) == 0.0


def test_attention_mass_is_summed_over_queries():
    probabilities = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    assert attention_mass(probabilities).tolist() == [[[1.25, 0.75]]]


def test_positional_window_with_padding():
    at = torch.tensor([[-1, 0, 1, 2, 3]])  # a padded position comes first
    seen = positional_window(at, at, sink=1, recent=2)[0]
    assert seen.int().tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 1, 1],
    ]


def test_obs_saliency_by_hand():
    assert obs_saliency(W, torch.tensor([0.5, 2.0])).tolist() == [[2.0, 2.0], [0.0, 4.5]]


def test_obs_saliency_is_the_error_after_the_best_repair():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    w = torch.randn(4, dtype=torch.float64, generator=generator)
    gram = x.T @ x
    scores = obs_saliency(w[None], torch.linalg.inv(gram).diagonal())[0]
    for removed in range(4):
        others = [j for j in range(4) if j != removed]
        fit = torch.linalg.lstsq(x[:, others], (x @ w)[:, None]).solution[:, 0]
        error = (x @ w - x[:, others] @ fit).square().sum()
        assert scores[removed].item() == pytest.approx(error.item(), rel=1e-5)


def test_gradient_scores():
    g = torch.tensor([[3.0, 0.5], [1.0, -1.0]])
    assert taylor(W, g).tolist() == [[3.0, 1.0], [0.0, 3.0]]
    assert fisher(W, g.square()).tolist() == [[4.5, 0.5], [0.0, 4.5]]


def test_random_scores_follow_the_seed_alone():
    a = uniform_random(torch.zeros(20, 30), seed=3)
    assert torch.equal(a, uniform_random(torch.zeros(20, 30, dtype=torch.bfloat16), seed=3))
    assert not torch.equal(a, uniform_random(torch.zeros(20, 30), seed=4))
    assert bool(((a >= 0) & (a < 1)).all())
    assert abs(a.mean().item() - 0.5) < 0.05
