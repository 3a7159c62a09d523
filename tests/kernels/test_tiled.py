"""Tiled matrices and their product: the layout, and the Triton kernel against float64 sums.

The kernel runs on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``) where triton is
installed; elsewhere the operator runs its definition, through the same layout.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.kernels.sparse_linear import Tiled, tile, tiled_linear
from gossamer.kernels.sparse_linear.tiled import ROWS, is_two_four
from gossamer.kernels.sparse_linear.tiled_op import tiled_linear_reference, usable

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = usable("cpu")  # the interpreter takes seconds for what a GPU does at once


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Every weight is removed by itself, so rows differ."""
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) >= sparsity
    return torch.where(kept, random(rows, columns, seed=seed), 0).to(dtype)


def two_four(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    weight = random(rows, columns, seed=seed)
    places = random(rows, columns // 4, 4, seed=seed + 1).argsort(2) < 2
    return (weight * places.view(rows, columns)).to(dtype)


def close(got: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Within a float32 sum's rounding and that of the result's type."""
    exact = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    # The interpreter cuts bits off where a GPU rounds.
    wide = (2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-11) * (2 if SMALL else 1)
    error = (got.double() - exact).abs()
    return bool((error <= 2e-6 * scale + wide * exact.abs() + 1e-7).all())


def test_what_gaps_store():
    weight = torch.zeros(2, 64)
    weight[0, [3, 5, 40]] = torch.tensor([1.0, 2.0, 3.0])
    weight[1, 63] = 4.0
    tiled = tile(weight, "gaps", torch.bfloat16, segments=1)
    # 35 columns from 5 to 40 are crossed by two zeros, 15 further each.
    assert tiled.values[0, 0, 0].tolist() == [1, 2, 0, 0, 3, 0, 0, 0]
    assert [(int(tiled.codes[0, 0, 0]) >> (4 * k)) & 15 for k in range(8)] == [
        *(0, 2, 15, 15, 5),
        *(0, 0, 0),
    ]
    assert tiled.start[0, 0, :2].tolist() == [3, 63]
    assert tiled.values[0, 0, 1].tolist() == [4, 0, 0, 0, 0, 0, 0, 0]
    assert tiled.order[:3].tolist() == [0, 1, -1]
    assert tiled.first.tolist() == [0, 1]


def test_what_two_four_stores():
    weight = torch.zeros(1, 16)
    weight[0, [1, 3, 4, 10, 11]] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    tiled = tile(weight, "2:4", torch.float16, segments=1)
    assert tiled.values[0, 0, 0].tolist() == [1, 2, 3, 0, 4, 5, 0, 0]
    # A group with one weight is filled up at its lowest free place.
    places = [1, 3, 0, 1, 2, 3, 0, 1]
    assert [(int(tiled.codes[0, 0, 0]) >> (2 * k)) & 3 for k in range(8)] == places
    bits = tile(torch.tensor([[0.0, 1, 0, 1]]).repeat(1, 256), "2:4", torch.bfloat16)
    read = bits.values.nbytes + bits.codes.nbytes
    assert read == 1024 * ROWS * 2 * 9 // 16  # of 16 bits a weight, 9 are stored


@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 130),
    sparsity=st.sampled_from([0.0, 0.3, 0.7, 0.97, 1.0]),
    dtype=st.sampled_from(DTYPES),
    segments=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 99),
)
def test_unpacking_gives_every_bit_back(rows, columns, sparsity, dtype, segments, seed):
    weight = matrix(rows, columns, sparsity, dtype, seed)
    tiled = tile(weight, "gaps", segments=segments)
    assert torch.equal(tiled.to_dense().view(torch.int16), weight.view(torch.int16))
    wide = columns // 16 * 16
    kept = two_four(rows, wide, dtype, seed)
    if rows and wide:
        tiled = tile(kept, "2:4", segments=segments)
        assert torch.equal(tiled.to_dense(), kept)


def test_no_two_lines_wait_for_a_longer_one():
    """Rows of equal length share a tile, so what fills them up stays small."""
    weight = torch.zeros(256, 1024)
    for row in range(0, 256, 8):
        weight[row] = 1
    weight[:, ::16] = 1
    tiled = tile(weight, "gaps", torch.bfloat16, segments=4)
    needed = 32 * 1024 + 224 * (64 + 63)  # gaps of 16 are crossed by a zero each
    assert tiled.values.numel() <= 1.03 * needed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["2:4", "gaps"])
def test_the_product_is_the_sum_of_what_is_kept(kind: str, dtype: torch.dtype):
    sizes = [(1, 16), (33, 48), (64, 256)] if SMALL else [(1, 16), (33, 48), (200, 1040)]
    for rows, columns in sizes:
        sparse = matrix(rows, columns, 0.7, dtype, seed=rows)
        weight = (two_four(rows, columns, dtype) if kind == "2:4" else sparse).to(DEVICE)
        for segments in (None, 1, 8):
            tiled = tile(weight, kind, segments=segments)  # type: ignore[arg-type]
            for batch in (1, 2, 3, 9, 16):
                x = random(batch, columns, seed=batch).to(dtype).to(DEVICE)
                got = tiled_linear(x, tiled)
                assert got.dtype == dtype
                assert close(got, x, weight), (rows, columns, segments, batch)
                assert torch.equal(got, tiled_linear(x, tiled))


def test_rows_and_gaps_of_any_kind():
    weight = torch.zeros(40, 600)
    for row in range(40):
        weight[row, :: row + 1] = random(len(range(0, 600, row + 1)), seed=row)
    weight[[0, 17]] = 0
    weight = weight.bfloat16().to(DEVICE)
    x = random(2, 600).bfloat16().to(DEVICE)
    got = tiled_linear(x, tile(weight, "gaps"))
    assert close(got, x, weight)
    assert not got[:, [0, 17]].any()


def test_any_leading_shape_and_a_bias():
    weight, bias = two_four(6, 32, torch.bfloat16).to(DEVICE), random(6).bfloat16().to(DEVICE)
    tiled = tile(weight, "2:4")
    x = random(32, 3, 2).permute(2, 1, 0).bfloat16().to(DEVICE)
    got = tiled_linear(x, tiled, bias)
    assert got.shape == (2, 3, 6)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, bias))
    assert tiled_linear(x[0, 0], tiled).shape == (6,)
    assert tiled_linear(x[:0], tiled).shape == (0, 3, 6)


def test_nothing_to_multiply():
    for rows, columns in ((0, 16), (3, 0), (5, 32)):
        tiled = tile(torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE), "gaps")
        got = tiled_linear(torch.ones(2, columns, dtype=torch.bfloat16, device=DEVICE), tiled)
        assert torch.equal(got.cpu(), torch.zeros(2, rows, dtype=torch.bfloat16))


def test_the_definition_is_the_product():
    weight = matrix(20, 70, 0.6, torch.float16)
    x = random(3, 70).half()
    assert close(tiled_linear_reference(x, tile(weight, "gaps")), x, weight)


@pytest.mark.skipif(DEVICE == "cpu" and SMALL, reason="the interpreter traces nothing")
def test_torch_sees_the_operator():
    tiled = tile(two_four(8, 32, torch.bfloat16).to(DEVICE), "2:4")
    for x in (
        random(3, 32).bfloat16().to(DEVICE),
        random(2, 32).bfloat16().to(DEVICE).requires_grad_(),
    ):
        torch.library.opcheck(
            torch.ops.gossamer.tiled_linear.default,
            (x, *tiled.tensors, *tiled.shape, 0),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def test_gradients_reach_the_input():
    weight = two_four(8, 32, torch.bfloat16).to(DEVICE)
    x = random(2, 32).bfloat16().to(DEVICE).requires_grad_()
    tiled_linear(x, tile(weight, "2:4")).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, -1), rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_captures_it():
    weight = matrix(128, 512, 0.7, torch.bfloat16).to("cuda")
    tiled = tile(weight, "gaps")
    x = random(4, 512).bfloat16().to("cuda")
    tiled_linear(x, tiled)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tiled_linear(x, tiled)
    x.copy_(random(4, 512, seed=5))
    graph.replay()
    assert close(got, x, weight)


def test_two_in_four_is_recognised():
    assert is_two_four(two_four(4, 32, torch.bfloat16))
    assert not is_two_four(torch.ones(4, 32))
    assert not is_two_four(torch.zeros(4, 20))  # no whole chunks
    three = torch.zeros(1, 16)
    three[0, 4:7] = 1
    assert not is_two_four(three)
    across = torch.zeros(1, 16)
    across[0, 2:6] = 1  # two of each of two groups
    assert is_two_four(across)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tile(torch.ones(4, 32), "gaps"), "pass dtype=torch.bfloat16"),
        (lambda: tile(torch.ones(4).half(), "gaps"), "matrices of bfloat16 or float16"),
        (lambda: tile(torch.ones(4, 32).half(), "2:4"), "at most two weights in every four"),
        (lambda: tile(torch.ones(4, 32).half(), "csr"), "unknown kind 'csr'"),  # type: ignore[arg-type]
        (lambda: tile(torch.ones(4, 32).half(), "gaps", segments=3), "a power of two"),
        (lambda: tile(torch.tensor([[NAN, 1, INF]]).half(), "gaps"), "2 weights are NaN or inf"),
        (
            lambda: tiled_linear(torch.ones(2, 31).half(), _small()),
            r"torch.float16 inputs of 32 features; got torch.float16 \(2, 31\)",
        ),
        (lambda: tiled_linear(torch.ones(2, 32), _small()), "got torch.float32"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(GossamerError, match=message):
        make()


def _small() -> Tiled:
    return tile(matrix(4, 32, 0.5, torch.float16), "gaps")
