"""Selection within rows against its definition: a stable descending sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core import Budget, GossamerError, rank
from gossamer.core.rank import check_scores, select_rows, topk_mask

INF = float("inf")
# Few distinct values, so that ties are the rule; -0.0 and 0.0 are equal.
VALUES = st.sampled_from([-INF, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0, INF])
MATRICES = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 40).flatmap(
        lambda columns: st.lists(
            st.lists(VALUES, min_size=columns, max_size=columns), min_size=rows, max_size=rows
        )
    )
)


def by_sorting(score: Tensor, keep: int) -> Tensor:
    order = torch.argsort(score, dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


@given(MATRICES, st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1)))
def test_counts_are_exact_and_ties_go_to_the_lower_index(values: list[list[float]], s: float):
    score = torch.tensor(values)
    columns = score.shape[1]
    mask = select_rows(score, Budget(sparsity=s))
    kept = round((1 - s) * columns)
    assert mask.sum(1).tolist() == [kept] * len(score)
    assert torch.equal(mask, by_sorting(score, kept))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 100])
def test_every_dtype_and_width_agrees_with_sorting(dtype: torch.dtype, columns: int):
    score = (torch.randn(9, columns, generator=torch.Generator().manual_seed(columns)) * 3).round()
    score = score.to(dtype)
    for keep in {0, 1, columns // 2, columns - 1, columns, columns + 5}:
        assert torch.equal(topk_mask(score, keep), by_sorting(score, min(keep, columns)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "infinite"])
def test_long_rows_are_counted_by_bits_with_the_same_result(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rank, "_LONG", 64)
    monkeypatch.setattr(rank, "_SERIAL", 100)
    score = torch.randn(3, 1003, generator=torch.Generator().manual_seed(0)) * 100
    if kind == "ties":
        score = (score / 50).round()
    if kind == "equal":
        score = torch.zeros_like(score)
    if kind == "infinite":
        score[:, ::3] = INF
        score[:, 1::5] = -INF
    score = score.to(dtype)
    for keep in (1, 2, 334, 500, 999, 1002):
        assert torch.equal(topk_mask(score, keep), by_sorting(score, keep))


def test_bool_scores_and_empty_rows_have_an_answer():
    assert topk_mask(torch.tensor([[False, True, True]]), 1).tolist() == [[False, True, False]]
    assert topk_mask(torch.zeros(0, 4), 2).shape == (0, 4)
    assert select_rows(torch.zeros(3, 0), Budget(sparsity=0.5)).shape == (3, 0)


def test_rows_that_are_not_contiguous():
    score = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)).T
    assert torch.equal(topk_mask(score, 17), by_sorting(score, 17))


def test_nan_is_an_error_that_names_the_tensor_and_counts():
    score = torch.ones(3, 5)
    score[1, 2] = score[2, 4] = float("nan")
    with pytest.raises(GossamerError, match=r"weight of q holds 2 NaN of 15"):
        check_scores(score, "weight of q")
    with pytest.raises(GossamerError, match="2 NaN"):
        select_rows(score, Budget(keep=1))
    check_scores(torch.tensor([INF, -INF]))


# -- protected entries ---------------------------------------------------------------------------


@given(MATRICES, st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_protected_entries_stay_and_count(values: list[list[float]], keep: int, seed: int):
    score = torch.tensor(values)
    columns = score.shape[1]
    protect = torch.rand(score.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    keep = min(columns, max(keep, int(protect.sum(1).max())))
    mask = select_rows(score, Budget(keep=keep), protect)
    assert bool(mask[protect].all())
    assert mask.sum(1).tolist() == [keep] * len(score)
    for row, safe, got in zip(score.tolist(), protect.tolist(), mask.tolist(), strict=True):
        free = [i for i in range(columns) if not safe[i]]
        best = sorted(free, key=lambda i: (-row[i], i))[: keep - sum(safe)]
        assert {i for i in free if got[i]} == set(best)


def test_too_many_protected_is_an_error_with_both_numbers():
    with pytest.raises(
        GossamerError, match="3 entries of a row are protected but the budget keeps 2"
    ):
        select_rows(torch.zeros(2, 4), Budget(keep=2), torch.tensor([[1, 1, 1, 0], [0] * 4]).bool())


@pytest.mark.parametrize("protect", [torch.zeros(2, 3).bool(), torch.zeros(2, 4)])
def test_protect_of_another_shape_or_dtype_is_refused(protect: Tensor):
    with pytest.raises(GossamerError, match="protect is a bool tensor"):
        select_rows(torch.zeros(2, 4), Budget(keep=2), protect)


# -- threshold and mass --------------------------------------------------------------------------


def test_threshold_keeps_what_reaches_it():
    score = torch.tensor([[0.1, 0.5, 0.9], [0.5, 0.4, INF]])
    mask = select_rows(score, Budget(threshold=0.5))
    assert mask.tolist() == [[False, True, True], [True, False, True]]
    protect = torch.tensor([[True, False, False], [False, False, False]])
    assert select_rows(score, Budget(threshold=0.5), protect)[0].all()


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12),
    st.one_of(st.sampled_from([0.0, 0.5, 0.75, 1.0]), st.floats(0, 1)),
)
def test_mass_keeps_the_fewest_that_reach_it(values: list[int], mass: float):
    mask = select_rows(torch.tensor([values], dtype=torch.float64), Budget(mass=mass))[0]
    kept = int(mask.sum())
    ranked = sorted(values, reverse=True)
    assert (
        sorted((v for v, m in zip(values, mask.tolist(), strict=True) if m), reverse=True)
        == (ranked[:kept])
    )
    assert sum(ranked[:kept]) >= mass * sum(values)
    assert kept == 0 or sum(ranked[: kept - 1]) < mass * sum(values)


def test_mass_one_keeps_every_positive_entry_however_small():
    score = torch.tensor([[1.0, 1e-30, 0.0, 1e-30]])
    assert select_rows(score, Budget(mass=1.0)).tolist() == [[True, True, False, True]]


def test_mass_refuses_negative_scores():
    with pytest.raises(GossamerError, match="at least 0"):
        select_rows(torch.tensor([[1.0, -1.0]]), Budget(mass=0.5))
