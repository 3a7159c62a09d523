"""The packed product against its definition: float64 sums over the kept weights."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.kernels import Packed, SparseLinear, build, pack, sparse_linear
from gossamer.kernels.sparse_linear import op
from gossamer.kernels.sparse_linear.pack import LAYOUTS, PAD, best_layout

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16]
BATCHES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(
    rows: int, columns: int, keep: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """``keep`` weights in every row, at random columns."""
    at = random(rows, columns, seed=seed + 1).argsort(1)[:, :keep]
    kept = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, at, True)
    return torch.where(kept, random(rows, columns, seed=seed), 0).to(dtype)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def close(got: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Within the rounding of a float32 sum of I terms, measured by the sum of their sizes."""
    limit = exact(x.abs(), weight.abs()) * 2e-6 + 1e-30
    return bool(((got.double() - exact(x, weight)).abs() <= limit).all())


@pytest.fixture(scope="module")
def best() -> int:
    try:
        return op._library()[1]
    except build.CannotBuild as error:
        pytest.skip(str(error))


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "avx512"])
def level(request: pytest.FixtureRequest, best: int) -> int:
    if request.param > best:
        pytest.skip("this machine does not offer the instruction set")
    return request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that were not written to are NaN."""
    monkeypatch.setattr(op.torch, "empty", lambda *shape: torch.full(shape, NAN))


# ---- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_each_layout_stores(layout: str):
    weight = torch.tensor([[0.0, 5.0, 0.0, 6.0], [7.0, 0.0, 0.0, 8.0]])
    packed = pack(weight, layout)
    assert packed.values[:4].tolist() == [5, 6, 7, 8]
    assert packed.values[4:].tolist() == [0] * PAD
    assert packed.start.tolist() == ([] if layout == "fanin" else [0, 2, 4])
    if layout == "bitmask":
        assert packed.index.tolist() == [[0b1010], [0b1001]]
        assert packed.nbytes == 4 * (4 + PAD) + 8 * 2 + 8 * 3
    else:
        assert packed.index[:4].tolist() == [1, 3, 0, 3]
        assert packed.index.dtype == torch.uint16
        assert packed.nbytes == 6 * (4 + PAD) + 8 * len(packed.start)
    assert packed.kept == 4
    assert packed.sparsity == 0.5
    assert f"2x4, {layout}, float32, sparsity 0.5000" in repr(packed)


@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 200),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    layout=st.sampled_from(["auto", "bitmask", "csr"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_unpacking_gives_every_bit_back(
    rows: int, columns: int, share: float, layout: str, dtype: torch.dtype, seed: int
):
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    weight = torch.where(keep, random(rows, columns, seed=seed), 0).to(dtype)
    packed = pack(weight, layout).check()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(packed.to_dense().view(bits), weight.view(bits))
    assert torch.equal(packed.mask(), weight != 0)
    assert packed.kept == int((weight != 0).sum())


def test_fan_in_gives_every_bit_back_and_needs_equal_rows():
    weight = matrix(5, 70, 11)
    packed = pack(weight, "fanin").check()
    assert torch.equal(packed.to_dense(), weight)
    weight[2, weight[2].nonzero()[0]] = 0
    with pytest.raises(GossamerError, match="rows keep 10 to 11 weights.* use layout csr"):
        pack(weight, "fanin")


def test_zeros_of_either_sign_are_removed_unless_a_mask_keeps_them():
    weight = torch.tensor([[-0.0, 0.0, 2.0]])
    assert pack(weight, "csr").kept == 1
    mask = torch.tensor([[True, False, True]])
    for layout in LAYOUTS:
        packed = pack(weight, layout, mask=mask).check()
        assert packed.kept == 2
        assert torch.equal(packed.to_dense().view(torch.int32), weight.view(torch.int32))
        assert torch.equal(packed.mask(), mask)


def test_the_dtype_asked_for_is_stored():
    weight = matrix(3, 20, 5).double()
    assert torch.equal(pack(weight, dtype=torch.bfloat16).to_dense(), weight.bfloat16())
    for refused in (weight, weight.half(), weight.to(torch.int8)):
        with pytest.raises(GossamerError, match=r"got torch.\w+: pass dtype=torch.float32"):
            pack(refused)


def test_columns_take_the_narrowest_number_that_names_them():
    for columns, dtype in ((65536, torch.uint16), (65537, torch.int32)):
        weight = torch.zeros(2, columns)
        weight[:, [0, 40_000, columns - 1]] = torch.tensor([1.0, 2.0, 3.0])
        packed = pack(weight, "csr").check()
        assert packed.index.dtype == dtype
        assert torch.equal(packed.to_dense(), weight)


def test_auto_takes_the_layout_of_fewer_bytes():
    for keep in (1, 3, 4, 32, 64):
        weight = matrix(128, 64, keep)
        chosen = pack(weight).layout
        assert chosen == best_layout((128, 64), 128 * keep, torch.float32)
        sizes = {layout: pack(weight, layout).nbytes for layout in ("bitmask", "csr")}
        assert sizes[chosen] <= min(sizes.values()) + 2 * PAD


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pack(torch.zeros(3)), r"takes a matrix and a mask of its shape; got \(3,\)"),
        (lambda: pack(torch.zeros(2, 3), mask=torch.ones(3, 2)), r"\(2, 3\), \(3, 2\)"),
        (lambda: pack(torch.zeros(2, 3), "coo"), "unknown layout 'coo'"),
        (lambda: pack(torch.tensor([[NAN, 1.0], [INF, 0]])), "2 kept weights are NaN or infinite"),
        (lambda: pack(torch.zeros(2, 3, dtype=torch.complex64)), "got torch.complex64"),
    ],
)
def test_what_cannot_be_packed_is_refused(make: Callable[[], Packed], message: str):
    with pytest.raises(GossamerError, match=message):
        make()


def test_tensors_that_contradict_one_another_are_noticed():
    bits, csr, fan = (pack(matrix(4, 70, 9), layout) for layout in LAYOUTS)
    beyond = bits.index.clone()
    beyond[0, 1] |= 1 << 60
    wrong = [
        replace(bits, index=beyond),
        replace(bits, index=bits.index[:, :1]),
        replace(csr, index=csr.index.int().flip(0).to(torch.uint16)),
        replace(csr, index=(csr.index.int() + 60).to(torch.uint16)),
        replace(csr, index=csr.index.int()),
        replace(csr, start=csr.start + 1),
        replace(csr, start=csr.start[[0, 2, 1, 3, 4]]),
        replace(csr, values=csr.values[:-1]),
        replace(csr, values=csr.values.double()),
        replace(fan, shape=(5, 70)),
        replace(fan, layout="coo"),
    ]
    for packed in wrong:
        with pytest.raises(GossamerError):
            packed.check()


# ---- the product --------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_dtype_size_batch_and_instruction_set(
    layout: str, dtype: torch.dtype, level: int
):
    sizes = [
        (1, 1, 1),
        (3, 16, 0),
        (5, 17, 17),
        (7, 64, 1),
        (6, 65, 40),
        (9, 333, 33),
        (2, 1000, 97),
    ]
    for rows, columns, keep in sizes:
        weight = matrix(rows, columns, keep, dtype, seed=rows)
        packed = pack(weight, layout)
        for batch in BATCHES:
            x = random(batch, columns, seed=batch)
            got = sparse_linear(x, packed, backend="cpu", level=level)
            assert got.shape == (batch, rows)
            assert close(got, x, weight), (rows, columns, keep, batch)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["bitmask", "csr"])
def test_rows_of_any_number_of_weights(layout: str, level: int):
    weight = random(40, 200)
    for row in range(40):
        weight[
            row, torch.randperm(200, generator=torch.Generator().manual_seed(row))[: row * 5]
        ] = 0
    weight[[0, 17, 39]] = 0
    for batch in BATCHES:
        x = random(batch, 200)
        got = sparse_linear(x, pack(weight, layout), backend="cpu", level=level)
        assert close(got, x, weight)
        assert not got[:, [0, 17, 39]].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_x_holds_where_no_weight_is_kept_has_no_say(layout: str, level: int):
    weight = matrix(24, 150, 30)
    packed = pack(weight, layout)
    for batch in (1, 3, 7, 16):
        x = random(batch, 150)
        x[0, 3], x[0, 149], x[-1, 70] = NAN, INF, -INF
        with_none = sparse_linear(x, packed, backend="reference")
        for b in range(batch):
            for o in range(24):
                at = weight[o].nonzero()[:, 0]
                terms = weight[o, at].double() * x[b, at].double()
                expected = terms.sum().float()
                for got in (
                    with_none[b, o],
                    sparse_linear(x, packed, backend="cpu", level=level)[b, o],
                ):
                    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
        assert bool(with_none[0].isfinite().any())
        assert not bool(with_none[0].isfinite().all())


def test_columns_beyond_what_sixteen_bits_name(level: int):
    weight = torch.zeros(3, 70_001)
    weight[:, ::7] = random(3, 10_001)
    weight[1] = 0
    for layout in ("bitmask", "csr"):
        for batch in (1, 4, 16):
            x = random(batch, 70_001)
            got = sparse_linear(x, pack(weight, layout), backend="cpu", level=level)
            assert close(got, x, weight)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pool", ["torch", "own"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_share_the_rows_and_change_no_bit(
    layout: str, pool: str, best: int, monkeypatch: pytest.MonkeyPatch
):
    packed = pack(matrix(517, 300, 90), layout)
    if pool == "own":
        monkeypatch.setattr(op, "_parallel", lambda: None)
    for batch in (1, 16, 20):
        x = random(batch, 300)
        alone = sparse_linear(x, packed, backend="cpu")
        for threads in (2, 3):
            monkeypatch.setattr(op.torch, "get_num_threads", lambda count=threads: count)
            assert torch.equal(sparse_linear(x, packed, backend="cpu"), alone)
        monkeypatch.setattr(op.torch, "get_num_threads", lambda: 1)


def test_shares_of_rows_that_differ_wildly(best: int, monkeypatch: pytest.MonkeyPatch):
    weight = torch.zeros(300, 400)
    weight[5:120] = random(115, 400)
    packed = pack(weight, "csr")
    monkeypatch.setattr(op.torch, "get_num_threads", lambda: 4)
    x = random(2, 400)
    assert close(sparse_linear(x, packed, backend="cpu"), x, weight)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_any_leading_shape_stride_dtype_and_a_bias(backend: str, best: int):
    weight, bias = matrix(6, 90, 20), random(6)
    packed = pack(weight)
    x = random(90, 5, 2).permute(2, 1, 0)
    got = sparse_linear(x, packed, bias, backend)
    assert got.shape == (2, 5, 6)
    torch.testing.assert_close(got, nn.functional.linear(x, weight, bias))
    assert sparse_linear(x[0, 0], packed, backend=backend).shape == (6,)
    for dtype, error in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        half = sparse_linear(x.to(dtype), packed, backend=backend)
        assert half.dtype == dtype
        expected = exact(x.to(dtype), weight).to(dtype)
        torch.testing.assert_close(half, expected, rtol=error, atol=error)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (4, 5)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_multiply(backend: str, shape: tuple[int, int], layout: str, best: int):
    packed = pack(torch.zeros(shape), layout).check()
    for batch in (0, 1, 5):
        got = sparse_linear(torch.ones(batch, shape[1]), packed, backend=backend)
        assert torch.equal(got, torch.zeros(batch, shape[0]))


def test_float64_is_computed_in_float64():
    weight = matrix(6, 90, 20)
    x = random(3, 90).double()
    torch.testing.assert_close(
        sparse_linear(x, pack(weight)), exact(x, weight), rtol=1e-13, atol=1e-13
    )
    with pytest.raises(GossamerError, match="use backend reference"):
        sparse_linear(x, pack(weight), backend="cpu")


def test_input_that_does_not_fit_is_refused(best: int):
    packed = pack(matrix(6, 90, 20))
    with pytest.raises(GossamerError, match=r"takes inputs of 90 features; got \(3, 91\)"):
        sparse_linear(torch.ones(3, 91), packed)
    with pytest.raises(GossamerError, match="unknown backend 'gpu'"):
        sparse_linear(torch.ones(90), packed, backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(GossamerError, match="this machine offers"):
        sparse_linear(torch.ones(90), packed, backend="cpu", level=best + 1)


def test_without_a_compiler_the_reference_runs_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(source: object) -> None:
        raise build.CannotBuild("no C++ compiler was found")

    op._library.cache_clear()
    op.usable.cache_clear()
    try:
        monkeypatch.setattr(build, "load", fail)
        weight, x = matrix(6, 90, 20), random(3, 90)
        packed = pack(weight)
        with caplog.at_level(logging.WARNING, "gossamer"):
            for _ in range(3):
                assert close(sparse_linear(x, packed), x, weight)
        assert op.backend_for(x, packed) == "reference"
        assert [record.getMessage() for record in caplog.records] == [
            "sparse linear runs on torch operations: no C++ compiler was found"
        ]
        with pytest.raises(build.CannotBuild):
            sparse_linear(x, packed, backend="cpu")
    finally:
        op._library.cache_clear()
        op.usable.cache_clear()


# ---- torch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_sees_the_operator(layout: str):
    packed = pack(matrix(6, 90, 20), layout)
    for x in (random(3, 90), random(2, 3, 90).requires_grad_()):
        torch.library.opcheck(
            torch.ops.gossamer.sparse_linear.default,
            (x, packed.values, packed.index, packed.start, 6, 90, op.code(packed)),
        )


def test_gradients_reach_x_and_bias():
    weight = matrix(6, 90, 20)
    x, bias = random(2, 3, 90).requires_grad_(), random(6).requires_grad_()
    sparse_linear(x, pack(weight), bias).square().sum().backward()
    mine = x.grad, bias.grad
    x.grad = bias.grad = None
    nn.functional.linear(x, weight, bias).square().sum().backward()
    torch.testing.assert_close(mine, (x.grad, bias.grad))


def test_compiled_without_a_break():
    layer = SparseLinear.from_linear(nn.Linear(90, 6))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = random(3, 90)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def pruned(rows: int, columns: int, keep: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=bias)
    linear.weight = nn.Parameter(matrix(rows, columns, keep, seed=seed))
    return linear


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_a_drop_in(bias: bool):
    linear = pruned(6, 90, 20, bias=bias).eval()
    layer = SparseLinear.from_linear(linear, "csr")
    x = random(2, 3, 90)
    torch.testing.assert_close(layer(x), linear(x))
    assert not layer.training
    assert "in_features=90, out_features=6" in repr(layer)
    assert f"bias={bias}, layout=csr, sparsity=0.7778" in repr(layer)
    back = layer.to_linear()
    assert torch.equal(back.weight, linear.weight)
    assert (back.bias is None) == (linear.bias is None)
    if bias:
        assert torch.equal(back.bias, linear.bias)
    half = layer.to(torch.bfloat16)(x.bfloat16())
    expected = linear.to(torch.bfloat16)(x.bfloat16())
    torch.testing.assert_close(half, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_state_loads_into_a_layer_of_other_contents(layout: str):
    source = SparseLinear.from_linear(pruned(6, 90, 20), layout)
    target = nn.Sequential(SparseLinear.from_linear(pruned(6, 90, 3, seed=5), "bitmask"))
    state = load(save({f"0.{k}": v for k, v in source.state_dict().items()}))
    target.load_state_dict(state)
    x = random(4, 90)
    assert torch.equal(target(x), source(x))
    assert target[0].packed.layout == layout


def test_a_state_that_does_not_belong_is_refused():
    layer = SparseLinear.from_linear(pruned(6, 90, 20), "csr")
    other = SparseLinear.from_linear(pruned(6, 91, 20), "csr").state_dict()
    with pytest.raises(GossamerError, match=r"matrix of shape \(6, 91\); this layer is 6x90"):
        layer.load_state_dict(other)
    state = layer.state_dict()
    state["index"] = state["index"].int().add(80).to(torch.uint16)
    with pytest.raises(GossamerError, match="do not ascend below 90"):
        layer.load_state_dict(state)
    with pytest.raises(GossamerError, match="the bias of 6 features"):
        SparseLinear(layer.packed, torch.zeros(5))
