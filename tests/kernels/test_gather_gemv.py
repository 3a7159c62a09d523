"""The gathered products against their definition in float64, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.kernels.gather_gemv import axpy_gemv, dot_gemv, gated_mlp, op, rows
from gossamer.kernels.gather_gemv import native as c
from gossamer.kernels.gather_gemv.rows import Rows

LEVELS = range(c.library()[1] + 1)
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
NAN, INF = float("nan"), float("inf")


def _layer(out: int, inner: int, dtype: torch.dtype, major="channel", seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator)
    return rows(weight, torch.randn(out, generator=generator), major, dtype)


def _x(batch: int, inner: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, inner, generator=torch.Generator().manual_seed(seed))


def _masked(x: Tensor, layer: Rows, cut: Tensor | None) -> Tensor:
    """Masked dense in float64, written without the reference."""
    x = x.double()
    if cut is not None:
        x = x.masked_fill(x.abs() <= cut, 0)
    y = x @ layer.dense(torch.float64).T
    return y if layer.bias is None else y + layer.bias.double()


def test_worked_example() -> None:
    layer = rows(torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]), torch.tensor([0.5, 0.0]))
    x = torch.tensor([[1.0, -2.0, 3.0]])
    assert layer.weight.tolist() == [[1, 2], [10, 20], [100, 200]]
    assert axpy_gemv(x, layer, torch.tensor([1.5])).tolist() == [[280.5, 560.0]]
    assert axpy_gemv(x, layer, torch.tensor([1.0, 2.0, 3.0])).tolist() == [[0.5, 0.0]]
    assert axpy_gemv(x, layer, index=torch.tensor([2, 0])).tolist() == [[301.5, 602.0]]
    other = rows(torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]]), None, "output")
    assert dot_gemv(x, other, torch.tensor([1])).tolist() == [[562.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(37, 53), (1, 1), (130, 64), (8200, 24)])
def test_axpy_and_dot_match_float64(dtype, level, batch, shape) -> None:
    out, inner = shape
    layer, x = _layer(out, inner, dtype), _x(batch, inner)
    cut = torch.rand(inner, generator=torch.Generator().manual_seed(2))
    for threshold in (None, cut, cut[:1]):
        y = axpy_gemv(x, layer, threshold, backend="cpu", level=level)
        torch.testing.assert_close(y.double(), _masked(x, layer, threshold), atol=2e-4, rtol=1e-5)
    chosen = torch.randperm(inner, generator=torch.Generator().manual_seed(3))[: inner // 2]
    y = axpy_gemv(x, layer, index=chosen, backend="cpu", level=level)
    only = torch.zeros(inner, dtype=torch.double).index_fill_(0, chosen, 1.0)
    torch.testing.assert_close(y.double(), _masked(x * only, layer, None), atol=2e-4, rtol=1e-5)
    turned = _layer(out, inner, dtype, "output")
    chosen = torch.randperm(out, generator=torch.Generator().manual_seed(4))[: out // 2 + 1]
    y = dot_gemv(x, turned, chosen, backend="cpu", level=level)
    expected = _masked(x, turned, None)[:, chosen]
    torch.testing.assert_close(y.double(), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_only_active_rows_are_read(level: int) -> None:
    """Rows of dropped channels hold NaN: one that is read anyhow shows."""
    x = _x(2, 40)
    cut = torch.tensor([0.8])
    active = ~(x.abs() <= cut).all(0)
    assert 5 < int(active.sum()) < 35
    weight = torch.randn(70, 40, generator=torch.Generator().manual_seed(0))
    weight[:, ~active] = NAN
    layer = rows(weight)
    y = axpy_gemv(x, layer, cut, backend="cpu", level=level)
    clean = rows(weight.nan_to_num())
    assert torch.equal(y, axpy_gemv(x, clean, cut, backend="cpu", level=level))
    assert torch.isfinite(y).all()
    turned = rows(weight.T.contiguous(), major="output")
    at = active.nonzero()[:, 0]
    y = dot_gemv(_x(1, 70), turned, at, backend="cpu", level=level)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("batch", [1, 3])
def test_faults_upstream_stay_visible(level: int, bad: float, batch: int) -> None:
    x, layer = torch.zeros(batch, 20), _layer(9, 20, torch.float32)
    x[-1, 7] = bad
    y = axpy_gemv(x, layer, torch.tensor([1e30]), backend="cpu", level=level)
    assert not torch.isfinite(y[-1]).any()
    assert torch.equal(y[0], layer.bias) or batch == 1


def test_a_boundary_value_is_dropped_and_an_empty_index_gives_the_bias() -> None:
    layer = _layer(9, 3, torch.float32)
    x = torch.tensor([[0.5, -0.5, 0.25]])
    assert torch.equal(axpy_gemv(x, layer, torch.tensor([0.5]), backend="cpu")[0], layer.bias)
    empty = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(axpy_gemv(x, layer, index=empty, backend="cpu")[0], layer.bias)
    assert dot_gemv(x, _layer(9, 3, torch.float32, "output"), empty).shape == (1, 0)


@given(
    st.integers(1, 4),
    st.integers(1, 90),
    st.integers(1, 90),
    st.floats(0, 2),
    st.sampled_from(DTYPES),
    st.integers(0, 999),
)
def test_union_of_the_rows_masks(batch, out, inner, cut, dtype, seed) -> None:
    layer, x = _layer(out, inner, dtype, seed=seed), _x(batch, inner, seed + 1)
    threshold = torch.tensor([cut])
    together = axpy_gemv(x, layer, threshold, backend="cpu")
    torch.testing.assert_close(
        together.double(), _masked(x, layer, threshold), atol=1e-4, rtol=1e-5
    )


def test_sums_do_not_depend_on_threads_or_time() -> None:
    layer, x = _layer(5000, 300, torch.float32), _x(1, 300)
    turned, cut = _layer(5000, 300, torch.float32, "output"), torch.tensor([0.5])
    at = torch.arange(0, 5000, 2)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append((axpy_gemv(x, layer, cut), dot_gemv(x, turned, at)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, found[0][0]) and torch.equal(d, found[0][1]) for a, d in found)


@pytest.mark.parametrize("act", c.ACTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_mlp_matches_float64(act: str, level: int, batch: int) -> None:
    hidden, inner = 48, 100
    gate, up = (_layer(inner, hidden, torch.float32, seed=s) for s in (1, 2))
    down, x = _layer(hidden, inner, torch.float32, seed=3), _x(batch, hidden) / 3
    cuts = (torch.tensor([0.1]), torch.tensor([0.2]), torch.rand(inner))
    wide = x.double()
    for first in (gate, None):
        expected = gated_mlp(wide, first, up, down, act=act, cuts=cuts, backend="reference")
        found = gated_mlp(x, first, up, down, act=act, cuts=cuts, backend="cpu", level=level)
        torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=1e-4)
    turned = _layer(inner, hidden, torch.float32, "output", seed=2)
    if act != "none":
        for last in (None, torch.tensor([0.3])):
            given = {"act": act, "mid": torch.tensor([0.15]), "cuts": (None, None, last)}
            expected = gated_mlp(wide, gate, turned, down, backend="reference", **given)
            found = gated_mlp(x, gate, turned, down, backend="cpu", level=level, **given)
            torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=1e-4)


def test_inactive_neurons_are_read_in_neither_matrix() -> None:
    hidden, inner, x = 16, 64, _x(1, 16)
    gate = _layer(inner, hidden, torch.float32, "output", seed=1)
    value = torch.nn.functional.relu(_masked(x, gate, None))[0]
    off = value <= 0.5
    up, down = torch.randn(inner, hidden), torch.randn(hidden, inner)
    up[off], down[:, off] = NAN, NAN
    y = gated_mlp(
        *(x, gate, rows(up, None, "output"), rows(down)),
        act="relu",
        mid=torch.tensor([0.5]),
        backend="cpu",
    )
    expected = (value[~off] * (up[~off].double() @ x[0].double())) @ down[:, ~off].double().T
    torch.testing.assert_close(y[0].double(), expected, atol=1e-4, rtol=1e-5)


def test_int8_steps_are_of_each_output() -> None:
    weight = torch.tensor([[1.0, -0.5, 0.0], [100.0, 30.0, -100.0], [0.0, 0.0, 0.0]])
    layer = rows(weight, dtype=torch.int8)
    assert layer.scale is not None
    assert layer.scale.tolist() == pytest.approx([1 / 127, 100 / 127, 1.0])
    assert layer.weight.T.tolist() == [[127, -64, 0], [127, 38, -127], [0, 0, 0]]
    assert float((layer.dense() - weight).abs().max()) <= 0.5 * 100 / 127
    assert layer.nbytes == 9 + 12


def test_output_major_rows_share_the_weights_memory() -> None:
    weight = torch.randn(4, 6)
    assert rows(weight, major="output").weight.data_ptr() == weight.data_ptr()
    assert rows(weight).weight.data_ptr() != weight.data_ptr()
    assert rows(weight, major="output", dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_more_rows_run_dense_and_it_is_said_once(caplog) -> None:
    op._say_once.cache_clear()
    layer, x = _layer(7, 11, torch.float32), _x(5, 11)
    cut = torch.tensor([0.3])
    with caplog.at_level("WARNING", "gossamer"):
        for _ in range(2):
            y = axpy_gemv(x, layer, cut)
    assert [r.message for r in caplog.records] == [
        "gathered products take 1 to 4 rows; got 5, which run dense"
    ]
    torch.testing.assert_close(y.double(), _masked(x, layer, cut), atol=1e-5, rtol=1e-5)
    with pytest.raises(GossamerError, match=r"1 to 4 rows .* got \(5, 11\)"):
        axpy_gemv(x, layer, cut, backend="cpu")


def test_bad_input_is_one_line() -> None:
    layer, x = _layer(7, 11, torch.float32), _x(1, 11)
    for call, words in (
        (lambda: rows(torch.ones(2, 2), dtype=torch.float16), "float16: pass dtype=torch.float32"),
        (lambda: rows(torch.tensor([[NAN]]), dtype=torch.int8), "cannot be int8"),
        (lambda: rows(torch.ones(2, 3), torch.ones(3)), r"got \(2, 3\) and \(3,\)"),
        (lambda: axpy_gemv(_x(1, 12), layer), r"takes \(rows, 11\) inputs; got \(1, 12\)"),
        (lambda: axpy_gemv(x, layer, torch.ones(3)), r"shape \(1,\) or \(11,\); got \(3,\)"),
        (lambda: axpy_gemv(x, layer, index=torch.tensor([11])), "reaches 11 to 11"),
        (lambda: axpy_gemv(x, layer, index=torch.tensor([-1])), "reaches -1 to -1"),
        (lambda: axpy_gemv(x, layer, backend="gpu"), "unknown backend"),
        (lambda: axpy_gemv(x, layer, backend="triton"), "backend triton takes"),
        (lambda: axpy_gemv(x, layer, backend="cpu", level=9), "levels 0 to"),
        (lambda: dot_gemv(x, layer, torch.tensor([0])), "output-major"),
        (lambda: gated_mlp(x, layer, layer, layer, act="tanh"), "unknown activation"),
        (lambda: gated_mlp(x, None, layer, layer, mid=torch.ones(1)), "output-major up"),
    ):
        with pytest.raises(GossamerError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_operators_compile() -> None:
    layer, x, cut = _layer(7, 11, torch.float32), _x(1, 11), torch.tensor([0.3])
    arguments = (x, layer.weight, None, layer.bias, cut, None)
    torch.library.opcheck(
        torch.ops.gossamer.axpy_gemv, arguments, test_utils=("test_schema", "test_faketensor")
    )
    turned = _layer(7, 11, torch.float32, "output")
    torch.library.opcheck(
        torch.ops.gossamer.dot_gemv,
        (x, turned.weight, None, turned.bias, torch.tensor([3, 1])),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(
        lambda t: torch.ops.gossamer.axpy_gemv(t, *arguments[1:]) * 2,
        fullgraph=True,
        backend="eager",
    )
    assert torch.equal(compiled(x), axpy_gemv(x, layer, cut) * 2)


def test_stream_reads_everything() -> None:
    """The sum it computes is right, so nothing was skipped."""
    data = torch.ones(1 << 20)
    found = c.library()[0].gossamer_gather_stream(data.data_ptr(), data.numel(), c.library()[1])
    assert found == data.numel()
    assert op.stream_rate(data, repeats=1) > 0
