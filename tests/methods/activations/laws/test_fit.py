"""Laws are recovered from their own points, with intervals that hold the truth."""

import math

import numpy as np
import pytest

from gossamer.core import GossamerError
from gossamer.methods.activations.laws.fit import fit_law, trend

TOKENS = [1e5 * 2**i for i in range(9)]


def _relu(d: float) -> float:
    return math.exp(-0.8 * (d / 1.6e6) ** 0.4 - 0.9) + 0.12


def _silu(d: float) -> float:
    return 0.62 - 0.15 / (d / 1.6e6) ** 0.5


def test_the_falling_law_is_recovered() -> None:
    law = fit_law(TOKENS, [_relu(d) for d in TOKENS], "relu")
    assert law.unit == pytest.approx(1.6e6)
    assert law.values == pytest.approx({"c": 0.8, "alpha": 0.4, "b": -0.9, "A0": 0.12}, rel=2e-2)
    assert law.limit == law.values["A0"]
    assert law(3e6) == pytest.approx(_relu(3e6), abs=1e-5)
    assert law.r2 == pytest.approx(1.0)
    assert law.error < 1e-6


def test_the_rising_law_is_recovered() -> None:
    law = fit_law(TOKENS, [_silu(d) for d in TOKENS], "silu")
    assert law.values == pytest.approx({"c": 0.15, "alpha": 0.5, "A0": 0.62}, rel=1e-3)
    assert law(1e9) == pytest.approx(_silu(1e9), abs=1e-4)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    random, inside = np.random.default_rng(0), 0
    for _ in range(20):
        noisy = [_silu(d) + random.normal(0, 0.004) for d in TOKENS]
        low, high = fit_law(TOKENS, noisy, "silu").bounds["A0"]
        inside += low <= 0.62 <= high
    assert 16 <= inside <= 20


def test_noise_widens_the_interval() -> None:
    random = np.random.default_rng(1)
    noise = random.normal(0, 1, len(TOKENS))
    widths = []
    for size in (0.001, 0.004):
        law = fit_law(
            TOKENS, [_silu(d) + size * n for d, n in zip(TOKENS, noise, strict=True)], "silu"
        )
        low, high = law.bounds["A0"]
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_a_law_prints_itself() -> None:
    text = str(fit_law(TOKENS, [_silu(d) for d in TOKENS], "silu"))
    assert text.startswith("A(D) = A0 - c / D^alpha, D in 1,600,000 tokens: c 0.15 (")
    assert "over 9 points" in text


@pytest.mark.parametrize(
    ("tokens", "active", "kind", "message"),
    [
        (TOKENS[:4], [0.5] * 4, "relu", "give at least 5 points"),
        (TOKENS[:3], [0.5] * 3, "silu", "give at least 4 points"),
        (TOKENS, [0.5] * 8, "silu", "9 token counts and 8 shares"),
        ([0.0, *TOKENS[1:]], [0.5] * 9, "silu", "above 0"),
        (TOKENS, [1.5] * 9, "silu", "between 0 and 1"),
        (TOKENS, [0.5] * 9, "gelu", "choose from relu, silu"),
    ],
)
def test_what_cannot_be_fitted_is_refused(tokens, active, kind, message) -> None:
    with pytest.raises(GossamerError, match=message):
        fit_law(tokens, active, kind)


def test_the_trend_is_a_rank_correlation() -> None:
    assert trend([1, 2, 3, 4], [0.4, 0.3, 0.2, 0.1]) == pytest.approx(-1.0)
    assert trend([1, 2, 3, 4], [0.1, 0.2, 0.4, 0.3]) == pytest.approx(0.8)
    assert trend([1, 2, 3], [0.2, 0.2, 0.2]) == 0.0
