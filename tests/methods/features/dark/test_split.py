import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.dark.split import (
    linear_fit,
    r_squared,
    split_error,
    with_linear_error,
)
from gossamer.methods.features.rules import TopK


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dictionary():
    made = Dictionary.random(8, 24, TopK(3), seed=0)
    with torch.no_grad():
        made.b_dec.copy_(normal(8, seed=5))
        made.b_enc.copy_(0.1 * normal(24, seed=6))
    return made.eval().requires_grad_(False)


def test_least_squares_finds_a_linear_map():
    x, weight = normal(50, 4), normal(4, 3, seed=1).double()
    fit = linear_fit(x, x.double() @ weight + 2)
    torch.testing.assert_close(fit.weight, weight)
    torch.testing.assert_close(fit.bias, torch.full((3,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(fit(x), x.double() @ weight + 2)


def test_least_squares_leaves_directions_without_variance_alone():
    x = torch.cat([normal(50, 2), torch.ones(50, 1)], 1)
    fit = linear_fit(x, x[:, :1])
    assert fit.weight[2].abs() < 1e-9


def test_r_squared_is_a_mean_over_channels():
    wanted = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 4.0, 2.0]])
    predicted = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 2.0, 0.0]])
    # 1 for the first channel, 0 for the mean of the second, 0 for the constant third.
    assert r_squared(wanted, predicted) == pytest.approx(1 / 3)


def test_an_error_that_is_linear_is_told_from_one_that_is_not():
    # Atoms see half of the channels only: what they miss of the others is x itself.
    made = Dictionary(8, 4, TopK(4)).eval().requires_grad_(False)
    made.W_dec[:, :4] = torch.eye(4)
    made.W_enc[:4] = torch.eye(4)
    x = torch.cat([normal(600, 4).abs(), normal(600, 4, seed=1)], 1)
    split = split_error(made, [x])
    assert split.error_r2 == pytest.approx(0.5, abs=1e-6)  # Four channels have no error.
    assert split.nonlinear_fvu < 1e-10 < 0.3 < split.fvu
    assert split.shuffled_r2 < 0.02
    assert (split.fitted, split.held) == (300, 300)
    noise = Dictionary.random(8, 24, TopK(1), seed=0).eval()
    assert split_error(noise, [normal(600, 8)]).error_r2 < 0.95


def test_the_norm_is_predicted_from_the_activation():
    made = Dictionary(2, 1, TopK(1)).eval().requires_grad_(False)
    size = normal(400, 1).abs() + 1
    sign = 1 - 2.0 * torch.randint(2, (400, 1), generator=torch.Generator().manual_seed(2))
    x = torch.cat([size.square(), sign * size], 1)
    made.W_enc[0, 0] = made.W_dec[0, 0] = 1
    split = split_error(made, [x])
    # Misses sign * size, whose square is the first channel.
    assert split.norm_r2 == pytest.approx(1, abs=1e-6)
    assert split.shuffled_norm_r2 < 0.1


def test_parts_add_up_to_the_activation():
    made, x = dictionary(), normal(300, 8, seed=3)
    split = split_error(made, [x])
    none, linear, rest = (
        with_linear_error(made, split.linear, part)(x) for part in ("none", "linear", "nonlinear")
    )
    torch.testing.assert_close(none, made(x), rtol=1e-4, atol=1e-5)
    predicted = split.linear(x).float()
    torch.testing.assert_close(linear, made(x) + predicted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rest, x - predicted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear + rest - none, x, rtol=1e-4, atol=1e-5)


def test_too_few_rows_are_refused():
    with pytest.raises(GossamerError, match="3 rows are too few"):
        split_error(dictionary(), [normal(3, 8)])
