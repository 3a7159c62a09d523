"""The compiled N:M selection against the definition: a stable descending sort of each group."""

import logging

import pytest
import torch
from torch import Tensor

from gossamer.core import NM, GossamerError
from gossamer.kernels import build, nm_mask
from gossamer.kernels.nm_select import op

INF = float("inf")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def by_sorting(groups: Tensor, keep: int) -> Tensor:
    order = torch.argsort(groups, dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)


def scores(count: int, of: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Half of the groups hold few distinct values with both zeros, some hold infinities."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, of, generator=generator) * 3
    values[::2] = values[::2].round() * 0.5
    extreme = torch.rand(count, of, generator=generator) < 0.05
    values[extreme] = INF * values[extreme].sign()
    return values.nan_to_num(0.0, INF, -INF).to(dtype)


@pytest.fixture(scope="module")
def best() -> int:
    try:
        return op._functions()[1]
    except build.CannotBuild as error:
        pytest.skip(str(error))


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "avx512"])
def level(request: pytest.FixtureRequest, best: int) -> int:
    if request.param > best:
        pytest.skip("this machine does not offer the instruction set")
    return request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was not written to reads as neither True nor False."""

    def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        assert dtype == torch.bool
        return torch.full(shape, 0xEE, dtype=torch.uint8).view(torch.bool)

    monkeypatch.setattr(op.torch, "empty", empty)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [2, 3, 4, 5, 8, 16, 32, 64, 65])
def test_every_width_dtype_and_instruction_set(dtype: torch.dtype, of: int, level: int):
    for count in (1, 15, 16, 17, 203):
        groups = scores(count, of, dtype, seed=count)
        for keep in {1, 2, of // 2, of - 1} - {0, of}:
            mask = nm_mask(groups, keep, "cpu", level)
            assert int(mask.view(torch.uint8).max()) <= 1
            assert torch.equal(mask, by_sorting(groups, keep)), (count, keep)


def test_the_reference_is_the_same_function():
    for of, keep in ((4, 2), (8, 1), (64, 30)):
        groups = scores(77, of)
        assert torch.equal(nm_mask(groups, keep, "reference"), by_sorting(groups, keep))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [4, 8])
def test_nan_is_noticed_wherever_it_is(dtype: torch.dtype, of: int, level: int):
    for place in (0, 63, 130, 41 * of - 1):
        groups = scores(41, of, dtype)
        groups.view(-1)[place] = -float("nan")
        with pytest.raises(GossamerError, match=f"1 NaN of {41 * of}"):
            nm_mask(groups, 2, "cpu", level)


def test_threads_share_the_groups(best: int, monkeypatch: pytest.MonkeyPatch):
    groups = scores(300_001, 4)
    monkeypatch.setattr(op.torch, "get_num_threads", lambda: 3)
    assert torch.equal(nm_mask(groups, 2, "cpu"), by_sorting(groups, 2))
    groups[-1, 3] = float("nan")
    with pytest.raises(GossamerError, match="1 NaN"):
        nm_mask(groups, 2, "cpu")


def test_tensors_that_are_not_contiguous_or_need_gradients(best: int):
    groups = scores(4, 100).T
    assert torch.equal(nm_mask(groups, 2, "cpu"), by_sorting(groups, 2))
    assert nm_mask(scores(8, 4).requires_grad_(), 2).sum() == 16


def test_the_ends(best: int):
    assert nm_mask(torch.zeros(3, 4), 4, "cpu").all()
    assert nm_mask(torch.zeros(0, 4), 2, "cpu").shape == (0, 4)
    assert nm_mask(torch.zeros(5, 4), 2, "cpu").tolist() == [[True, True, False, False]] * 5


def test_other_dtypes_go_to_the_reference():
    groups = torch.tensor([[3, 1, 3, 3]])
    assert nm_mask(groups, 2).tolist() == [[True, False, True, False]]
    with pytest.raises(GossamerError, match="use backend reference"):
        nm_mask(groups, 2, "cpu")


@pytest.mark.parametrize("keep", [0, 5])
def test_input_that_is_no_nm_is_refused(keep: int):
    with pytest.raises(GossamerError, match="0 < keep <= M"):
        nm_mask(torch.zeros(2, 4), keep)
    with pytest.raises(GossamerError, match="unknown backend 'gpu'"):
        nm_mask(torch.zeros(2, 4), 2, "gpu")  # type: ignore[arg-type]


def test_an_instruction_set_this_machine_lacks_is_refused(best: int):
    with pytest.raises(GossamerError, match="this machine offers"):
        nm_mask(torch.zeros(2, 4), 2, "cpu", best + 1)


def test_without_a_compiler_the_reference_runs_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(source: object) -> None:
        raise build.CannotBuild("no C++ compiler was found")

    op._functions.cache_clear()
    op._usable.cache_clear()
    try:
        monkeypatch.setattr(build, "load", fail)
        groups = scores(50, 4)
        with caplog.at_level(logging.WARNING, "gossamer"):
            for _ in range(3):
                assert torch.equal(nm_mask(groups, 2), by_sorting(groups, 2))
        assert op.backend_for(groups) == "reference"
        assert [record.getMessage() for record in caplog.records] == [
            "N:M selection runs on torch operations: no C++ compiler was found"
        ]
        with pytest.raises(build.CannotBuild):
            nm_mask(groups, 2, "cpu")
    finally:
        op._functions.cache_clear()
        op._usable.cache_clear()


def test_torch_sees_the_operator():
    groups = scores(10, 4)
    torch.library.opcheck(torch.ops.gossamer.nm_mask.default, (groups, 2))
    compiled = torch.compile(
        lambda x: torch.ops.gossamer.nm_mask(x, 2), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(groups), by_sorting(groups, 2))


def test_the_pattern_runs_on_the_operator(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    kernel = torch.ops.gossamer.nm_mask
    monkeypatch.setattr(
        "gossamer.core.pattern._nm_kernel",
        lambda: lambda groups, keep: calls.append(keep) or kernel(groups, keep),
    )
    NM(2, 4).select(scores(6, 8))
    assert calls == [2]
