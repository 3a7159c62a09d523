"""Operators against brute-force minimisation of t f(x) + (x - v)² / 2 on a fine grid."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.core.prox import PROX, cel0, group, half, hard, nuclear, soft

GRID = torch.arange(-80_000, 80_001, dtype=torch.float64) * 5e-5  # 0 is on it


def cel0_penalty(x: Tensor, step: float, norm: float) -> Tensor:
    edge = (2 * step) ** 0.5 / norm
    inside = step - norm**2 / 2 * (x.abs() - edge).square()
    return torch.where(x.abs() <= edge, inside, step)


PENALTIES: dict[
    str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]
] = {
    "soft": (soft, lambda x, t: t * x.abs()),
    "hard": (hard, lambda x, t: t * (x != 0)),
    "half": (half, lambda x, t: t * x.abs().sqrt()),
    "cel0 0.5": (cel0, lambda x, t: cel0_penalty(x, t, 0.5)),
    "cel0 0.9": (lambda v, t: cel0(v, t, 0.9), lambda x, t: cel0_penalty(x, t, 0.9)),
    "cel0 1": (lambda v, t: cel0(v, t, 1.0), lambda x, t: cel0_penalty(x, t, 1.0)),
    "cel0 2": (lambda v, t: cel0(v, t, 2.0), lambda x, t: cel0_penalty(x, t, 2.0)),
}


@pytest.mark.parametrize("name", PENALTIES)
@given(v=st.floats(-3, 3), step=st.floats(1e-3, 2.0))
def test_nothing_on_the_grid_is_better(name: str, v: float, step: float):
    operator, penalty = PENALTIES[name]

    def objective(x: Tensor) -> Tensor:
        return penalty(x, step) + (x - v).square() / 2

    found = operator(torch.tensor([v], dtype=torch.float64), step)
    assert objective(found).item() <= objective(GRID).min().item() + 1e-9


@pytest.mark.parametrize("name", PENALTIES)
def test_the_minimiser_itself_where_it_is_clear(name: str):
    operator, penalty = PENALTIES[name]
    for v in (-2.9, -1.3, -0.2, 0.0, 0.4, 2.2):
        objective = penalty(GRID, 0.3) + (GRID - v).square() / 2
        best = GRID[objective.argmin()].item()
        found = operator(torch.tensor([v], dtype=torch.float64), 0.3).item()
        assert found == pytest.approx(best, abs=2e-4)


@pytest.mark.parametrize("name", ["soft", "hard", "cel0", "half", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identity_at_zero_and_odd_elsewhere(name: str, dtype: torch.dtype):
    v = torch.tensor([[0.0, 1e-3, -0.7, 2.0]], dtype=dtype)
    torch.testing.assert_close(PROX[name](v, 0.0), v)
    out = PROX[name](v, 0.5)
    assert out.dtype == dtype
    assert torch.equal(PROX[name](-v, 0.5), -out)
    assert bool((out * v >= 0).all())
    assert bool((out.abs() <= v.abs()).all())


@pytest.mark.parametrize("name", PROX)
def test_zero_stays_zero_and_negative_steps_are_refused(name: str):
    assert not PROX[name](torch.zeros(2, 3), 0.0).any()
    assert not PROX[name](torch.zeros(2, 3), 0.7).any()
    with pytest.raises(GossamerError, match="at least 0"):
        PROX[name](torch.zeros(2, 3), -0.1)


def test_cel0_has_the_penalty_it_names():
    # It is 0 at 0, the l0 price from its edge on, and continuous: c = sqrt(2 t) / a = 1.5492.
    at = cel0_penalty(torch.tensor([0.0, 1.549, 1.550, 3.0], dtype=torch.float64), 0.3, 0.5)
    assert at.tolist() == pytest.approx([0.0, 0.3, 0.3, 0.3], abs=1e-6)
    with pytest.raises(GossamerError, match="above 0"):
        cel0(torch.ones(1), 0.1, norm=0.0)


def test_thresholds_are_where_the_formulas_say():
    v = torch.tensor([0.999, 1.001], dtype=torch.float64)
    assert (hard(v * (2 * 0.3) ** 0.5, 0.3) != 0).tolist() == [False, True]
    assert (half(v * 1.5 * 0.3 ** (2 / 3), 0.3) != 0).tolist() == [False, True]
    assert (cel0(v * (2 * 0.3) ** 0.5 * 0.5, 0.3) != 0).tolist() == [False, True]


def test_group_shrinks_the_norm_and_drops_whole_groups():
    v = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(group(v, 1.0), torch.tensor([[2.4, 3.2], [0.0, 0.0]]))
    torch.testing.assert_close(group(v.T, 1.0, dim=0), group(v, 1.0).T)


@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 2))
def test_nuclear_thresholds_the_singular_values(rows: int, columns: int, step: float):
    v = torch.randn(
        2, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)
    )
    out = nuclear(v, step)
    expected = (torch.linalg.svdvals(v) - step).clamp_min(0)
    torch.testing.assert_close(torch.linalg.svdvals(out), expected, atol=1e-9, rtol=1e-9)

    def objective(x: Tensor) -> Tensor:
        return step * torch.linalg.svdvals(x).sum(-1) + (x - v).square().sum((-2, -1)) / 2

    noise = torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(9))
    for size in (1e-3, 1e-1):
        assert bool((objective(out) <= objective(out + size * noise) + 1e-12).all())
