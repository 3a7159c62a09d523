import itertools

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.separability import dense_codes
from gossamer.methods.features.supervised.control import (
    approximation,
    best_f1,
    latent_weights,
    sparse_edit,
)

MADE = Dictionary.random(8, 20, TopK(4), seed=0).eval().requires_grad_(False)
CLEAN, OTHER = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).unbind(0)


def test_approximation_goes_from_the_mean_to_the_whole():
    assert approximation(10.0, 2.0, 6.0) == pytest.approx(0.5)
    with pytest.raises(GossamerError, match="changes nothing"):
        approximation(1.0, 1.0, 1.0)


def test_one_latent_is_the_best_single_one():
    change = sparse_edit(MADE, CLEAN, OTHER, 1)
    amounts = dense_codes(MADE, OTHER) - dense_codes(MADE, CLEAN)
    for row in range(5):
        steps = torch.cat([amounts[row][:, None] * MADE.W_dec, torch.zeros(1, 8)])
        best = (OTHER[row] - CLEAN[row] - steps).norm(dim=1).min()
        assert (OTHER[row] - CLEAN[row] - change[row]).norm() == pytest.approx(
            float(best), abs=1e-5
        )


def test_each_step_comes_closer_and_none_is_used_twice():
    far = [(OTHER - CLEAN - sparse_edit(MADE, CLEAN, OTHER, q)).norm(dim=1) for q in range(9)]
    assert all((b <= a + 1e-6).all() for a, b in itertools.pairwise(far))
    assert (far[2] < far[0]).all()
    amounts = (dense_codes(MADE, OTHER) - dense_codes(MADE, CLEAN)).abs().sum(1)
    assert (sparse_edit(MADE, CLEAN, OTHER, 50).norm(dim=1) <= amounts + 1e-5).all()


def test_no_latents_no_change():
    assert not sparse_edit(MADE, CLEAN, OTHER, 0).any()


def test_f1_worked():
    active = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]]).bool()
    truth = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 1]]).bool()
    score, which = best_f1(active, truth)
    assert score.tolist() == pytest.approx([2 / 3, 0.5])
    assert which.tolist() == [0, 1]


def test_weights_sum_to_one_and_follow_the_reconstruction():
    weights = latent_weights(MADE, CLEAN)
    assert torch.allclose(weights.sum(1), torch.ones(5), atol=1e-5)
    assert not weights[dense_codes(MADE, CLEAN) == 0].any()
