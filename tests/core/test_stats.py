"""Accumulators against the formulas in float64, however the tokens are split."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core import Accumulator, GossamerError, QuantileSketch, Stat
from gossamer.core.stats import Gradient, Hessian, InputMoments, InputNorm

WIDTH = 6


def rows(count: int = 400, seed: int = 0) -> Tensor:
    noise = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    # A mean far from zero is what E[x²] - E[x]² would lose.
    return noise * torch.tensor([1e-3, 1.0, 5.0, 1.0, 100.0, 0.0]) + torch.tensor(
        [0.0, 300.0, -5.0, 0.0, 1.0, 2.0]
    )


def fed(stat: Stat, parts: list[Tensor]) -> Accumulator:
    accumulator = stat.accumulator(WIDTH)
    for part in parts:
        accumulator.update(part)
    return accumulator


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, QuantileSketch):
        return [value.counts]
    return [value] if isinstance(value, Tensor) else list(value)  # type: ignore[call-overload]


@pytest.mark.parametrize("stat", list(Stat))
@given(cuts=st.lists(st.integers(0, 400), max_size=6))
def test_splitting_and_merging_change_nothing(stat: Stat, cuts: list[int]):
    data = rows()
    parts = list(torch.tensor_split(data, sorted(cuts)))
    whole, split = fed(stat, [data]), fed(stat, parts)
    merged = stat.accumulator(WIDTH)
    for part in parts:
        merged.merge(fed(stat, [part]))
    assert whole.tokens == split.tokens == merged.tokens == 400
    for other in (split, merged):
        for a, b in zip(tensors(whole.value()), tensors(other.value()), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)


def test_norm():
    expected = rows().double().square().sum(0).sqrt().float()
    torch.testing.assert_close(fed(Stat.INPUT_L2, [rows()]).value(), expected)


def test_moments_survive_a_large_mean():
    mean, variance = fed(Stat.INPUT_MOMENTS, list(rows().split(7))).value()
    data = rows().double()
    torch.testing.assert_close(mean, data.mean(0).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, data.var(0, correction=0).float(), rtol=1e-4, atol=1e-8)


def test_hessian():
    data = rows().double()
    expected = (2 / len(data) * data.T @ data).float()
    value = fed(Stat.HESSIAN, list(rows().split(64))).value()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(value, value.T)


def test_gradient_takes_one_per_batch():
    accumulator = Gradient(WIDTH)
    for row in rows(8):
        accumulator.update(row[None])
    mean, square = accumulator.value()
    torch.testing.assert_close(mean, rows(8).mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(square, rows(8).square().mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [InputNorm, InputMoments, Hessian, QuantileSketch])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_leaves_no_trace(kind: type[Accumulator], value: float):
    accumulator = kind(WIDTH)
    bad = rows(4)
    bad[2, 3] = value
    with pytest.raises(GossamerError, match="NaN or infinity"):
        accumulator.update(bad)
    assert accumulator.tokens == 0


def test_finite_rows_whose_sum_overflows_are_taken():
    accumulator = QuantileSketch(2)
    accumulator.update(torch.full((3, 2), 3e38))
    assert accumulator.tokens == 3


def test_widths_kinds_and_empty_batches():
    accumulator = InputNorm(WIDTH)
    accumulator.update(torch.zeros(0, WIDTH))
    assert accumulator.tokens == 0
    with pytest.raises(GossamerError, match=r"takes \(tokens, 6\); got \(2, 3\)"):
        accumulator.update(torch.zeros(2, 3))
    with pytest.raises(GossamerError, match="cannot take in"):
        accumulator.merge(InputNorm(WIDTH + 1))
    with pytest.raises(GossamerError, match="cannot take in Hessian"):
        accumulator.merge(Hessian(WIDTH))
    assert Hessian(WIDTH).nbytes == WIDTH * WIDTH * 4


def test_half_precision_rows_are_summed_in_full():
    accumulator = InputNorm(1)
    accumulator.update(torch.full((70_000, 1), 10.0, dtype=torch.float16))
    assert accumulator.value().item() == pytest.approx((70_000 * 100) ** 0.5, rel=1e-6)


# -- quantiles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@given(share=st.floats(0.001, 1.0))
def test_quantiles_are_within_a_thousandth(scale: float, share: float):
    data = torch.randn(20_000, generator=torch.Generator().manual_seed(3)).mul(scale).view(-1, 4)
    sketch = QuantileSketch(4)
    sketch.update(data)
    ranked = data.abs().flatten().double().sort().values
    exact = float(ranked[max(0, -(-int(share * 20_000 * 1e9) // 10**9) - 1)])
    above = float(ranked[min(19_999, int(share * 20_000) + 1)])
    assert exact * 0.999 <= sketch.quantile(share) <= above * 1.001


@given(st.floats(0.001, 1.0))
def test_share_below_a_quantile_is_at_least_its_share(share: float):
    sketch = QuantileSketch(WIDTH)
    sketch.update(rows(500, seed=5))
    assert sketch.share_below(sketch.quantile(share)) >= share - 1e-9


def test_share_below_counts_to_the_resolution_of_a_bin():
    sketch = QuantileSketch(1)
    sketch.update(torch.arange(-50.0, 50.0)[:, None])
    assert sketch.share_below(0.0) == 0.01
    assert sketch.share_below(10.4) == 0.21
    assert sketch.share_below(1e9) == 1.0
    assert QuantileSketch(1).share_below(1.0) == 0.0


def test_ends_of_the_quantiles():
    sketch = QuantileSketch(2)
    with pytest.raises(GossamerError, match="no tokens"):
        sketch.quantile(0.5)
    sketch.update(torch.tensor([[0.0, -4.0], [0.0, 2.0]]))
    assert sketch.quantile(0.0) == 0.0
    assert 0.0 < sketch.quantile(0.5) < 1e-11
    assert sketch.quantile(1.0) == pytest.approx(4.0, rel=1e-3)
