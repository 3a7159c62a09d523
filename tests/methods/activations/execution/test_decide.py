"""The estimate that decides before anything is built."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.kernels.measured import Choice
from gossamer.methods.activations.execution import bandwidth, choice, predict
from gossamer.methods.activations.gates import Gate


def test_bytes_over_bandwidth() -> None:
    found = predict((1000, 2000), 0.5, rate=1e9, width=4).milliseconds
    assert found["dense"] == pytest.approx(8.005, abs=1e-3)
    assert found["axpy"] == pytest.approx(4 / 0.9, rel=1e-2)
    assert found["slice"] == pytest.approx(12.0, rel=1e-2)  # read, written and read again
    assert predict((1000, 2000), 0.5, rate=1e9, width=1).milliseconds["dense"] < 2.1


def test_the_union_of_rows_grows() -> None:
    times = [predict((4096, 4096), 0.5, n, rate=3e10).milliseconds["axpy"] for n in (1, 2, 4)]
    assert times == sorted(times)
    assert times[2] == pytest.approx(times[0] * (1 - 0.5**4) / 0.5, rel=0.05)


def test_dense_when_it_would_lose() -> None:
    assert predict((4096, 11008), 0.5, rate=3e10).best() in ("axpy", "dot")
    assert predict((4096, 11008), 0.05, rate=3e10).best() == "dense"
    assert predict((4096, 11008), 0.5, rate=3e10).best("dense", "slice") == "dense"
    assert predict((4096, 11008), 0.9, rate=3e10).best("dense", "slice") == "slice"
    assert predict((32, 32), 0.9, rate=3e10).best() == "dense"
    assert predict((4096, 11008), 0.3, 4, rate=3e10).best() == "dense"


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0.01, 1), st.integers(1, 8))
def test_sparser_is_never_slower(out: int, inner: int, sparsity: float, rows: int) -> None:
    one = predict((out, inner), sparsity, rows, rate=1e10).milliseconds
    more = predict((out, inner), min(1.0, sparsity + 0.1), rows, rate=1e10).milliseconds
    assert all(more[form] <= one[form] * 1.0001 for form in one)
    assert all(value > 0 for value in one.values())


def test_bad_numbers() -> None:
    for values in ({"sparsity": 1.1}, {"rows": 0}, {"rate": 0.0}, {"width": 0}):
        with pytest.raises(GossamerError):
            predict((4, 4), **{"sparsity": 0.5, "rate": 1e9, **values})


def test_bandwidth_is_measured_once() -> None:
    assert bandwidth() == bandwidth() > 1e8


@pytest.mark.parametrize("sparse", [0.1, 3.0])
def test_what_is_measured_decides(monkeypatch, sparse: float) -> None:
    """Both candidates compute the layer; the one that measured faster is taken."""
    module = torch.nn.Linear(2048, 1024)
    gate = Gate("up", "mlp.up", 0, "up", module.weight.numel(), 0.9, torch.tensor([0.5]))
    results: list[torch.Tensor] = []

    def measured(key: str, candidates, **settings) -> Choice:
        results.extend(call() for call in candidates.values())
        times = {name: sparse if name == "axpy" else 1.0 for name in candidates}
        return Choice(min(times, key=lambda name: times[name]), times)

    monkeypatch.setattr(choice, "fastest", measured)
    monkeypatch.setattr(choice, "bandwidth", lambda: 3e10)
    chooser = choice.Chooser(1)
    with torch.no_grad():
        layer = chooser.layer("up", module.weight, module.bias, gate)
        again = chooser.layer("up too", module.weight, module.bias, gate)
    assert (layer is None) is (again is None) is (sparse > 1)
    assert len(results) == 4  # the second layer is like the first
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], atol=1e-4, rtol=1e-4)
    row = chooser.table[0]
    assert (row.layer, row.rows, row.shape) == ("up", "1", (1024, 2048))
    assert row.chosen == ("axpy" if sparse < 1 else "dense")
    assert row.milliseconds == {"dense": 1.0, "axpy": sparse}
    if layer is not None:
        assert torch.equal(layer.weight, module.weight.T)
