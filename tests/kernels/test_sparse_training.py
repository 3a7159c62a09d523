"""The three products against dense matrix products in float64."""

import logging

import pytest
import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.kernels import build
from gossamer.kernels.sparse_training import (
    Connections,
    connection_gradient,
    op,
    sparse_product,
    transposed_product,
)

SHAPE = (13, 17)
BATCHES = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 129]


def matrix(
    shape: tuple[int, int] = SHAPE, count: int = 60, dtype: torch.dtype = torch.float32
) -> Connections:
    generator = torch.Generator().manual_seed(count)
    places = torch.randperm(shape[0] * shape[1], generator=generator)[:count].sort().values
    values = torch.randn(count, generator=generator).to(dtype)
    return Connections.at(values, places, shape)


def batch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.fixture(scope="module")
def best() -> int:
    try:
        return op._library()[1]
    except build.CannotBuild as error:
        pytest.skip(str(error))


@pytest.fixture(params=["reference", 0, 1, 2], ids=["reference", "portable", "avx2", "avx512"])
def how(request: pytest.FixtureRequest) -> dict[str, object]:
    if request.param == "reference":
        return {"backend": "reference"}
    if request.param > request.getfixturevalue("best"):
        pytest.skip("this machine does not offer the instruction set")
    return {"backend": "cpu", "level": request.param}


def close(found: Tensor, wanted: Tensor) -> None:
    tolerance = 2e-5 if found.dtype == torch.float32 else 1e-12
    assert torch.allclose(found.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", BATCHES)
class TestProducts:
    def test_forward(self, how, columns, dtype):
        it, x = matrix(dtype=dtype), batch(SHAPE[1], columns, dtype)
        found = sparse_product(it, x, **how)
        assert found.dtype == dtype
        close(found, it.dense().double() @ x.double())

    def test_backward(self, how, columns, dtype):
        it, delta = matrix(dtype=dtype), batch(SHAPE[0], columns, dtype)
        close(transposed_product(it, delta, **how), it.dense().double().t() @ delta.double())

    def test_gradient(self, how, columns, dtype):
        it = matrix(dtype=dtype)
        delta, x = batch(SHAPE[0], columns, dtype), batch(SHAPE[1], columns, dtype)
        dense = (delta.double() @ x.double().t()).flatten()
        close(connection_gradient(it, delta, x, **how), dense[it.places()])


def test_a_worked_matrix(how):
    # [[0, 2, 0], [0, 0, 0], [1, 0, 3]]
    it = Connections.at(torch.tensor([2.0, 1.0, 3.0]), torch.tensor([1, 6, 8]), (3, 3))
    assert it.start.tolist() == [0, 1, 1, 3]
    assert it.columns.tolist() == [1, 0, 2]
    x = torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]])
    assert sparse_product(it, x, **how).tolist() == [[4, 10], [0, 0], [10, 22]]
    assert transposed_product(it, x, **how).tolist() == [[3, 6], [2, 8], [9, 18]]
    # Entries (0, 1), (2, 0), (2, 2) of x x^T.
    assert connection_gradient(it, x, x, **how).tolist() == [22, 27, 45]


def test_nothing_outside_the_connections_is_read(how):
    """A feature without connections may hold anything."""
    it = Connections.at(torch.ones(2), torch.tensor([0, 3]), (2, 3))
    x = batch(3, 20, torch.float32)
    x[1:] = float("nan")
    assert torch.isfinite(sparse_product(it, x, **how)).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("columns", [5, 33, 200])
def test_threads_change_no_bit(best, threads, columns):
    before = torch.get_num_threads()
    it = matrix((40, 30), 333)
    x, delta = batch(30, columns, torch.float32), batch(40, columns, torch.float32)
    runs = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            runs.append(
                (
                    sparse_product(it, x, "cpu"),
                    transposed_product(it, delta, "cpu"),
                    connection_gradient(it, delta, x, "cpu"),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("count", [0, 1, 13 * 17])
def test_no_and_all_connections(how, count):
    it, x = matrix(count=count), batch(17, 20, torch.float32)
    close(sparse_product(it, x, **how), it.dense().double() @ x.double())
    assert len(connection_gradient(it, batch(13, 20, torch.float32), x, **how)) == count
    assert it.sparsity == pytest.approx(1 - count / 221)


def test_places_go_round():
    it = matrix()
    again = Connections.at(it.values, it.places(), SHAPE)
    assert torch.equal(again.columns, it.columns)
    assert torch.equal(again.start, it.start)


@pytest.mark.parametrize("places", [[3, 3], [5, 4], [-1, 2], [0, 221]])
def test_impossible_places_are_refused(places):
    with pytest.raises(GossamerError, match="ascending positions"):
        Connections.at(torch.ones(2), torch.tensor(places), SHAPE)


def test_misfits_are_refused(best):
    it, x = matrix(), batch(17, 4, torch.float32)
    with pytest.raises(GossamerError, match="one feature a row"):
        sparse_product(it, x.t())
    with pytest.raises(GossamerError, match="one feature a row"):
        transposed_product(it, x)
    with pytest.raises(GossamerError, match="one batch"):
        connection_gradient(it, batch(13, 5, torch.float32), x)
    with pytest.raises(GossamerError, match="the same for"):
        sparse_product(it, x.double(), "cpu")
    with pytest.raises(GossamerError, match="unknown backend"):
        sparse_product(it, x, "gpu")  # type: ignore[arg-type]
    with pytest.raises(GossamerError, match="levels 0 to"):
        sparse_product(it, x, "cpu", level=9)


def test_without_a_compiler_the_reference_runs(monkeypatch, caplog):
    def broken() -> None:
        raise build.CannotBuild("no C++ compiler was found")

    op._usable.cache_clear()
    monkeypatch.setattr(op, "_library", broken)
    try:
        with caplog.at_level(logging.WARNING, logger="gossamer"):
            it, x = matrix(), batch(17, 4, torch.float32)
            close(sparse_product(it, x), it.dense().double() @ x.double())
        assert "no C++ compiler" in caplog.text
    finally:
        op._usable.cache_clear()
