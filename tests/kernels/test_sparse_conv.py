"""The packed 1x1 convolution against its definition: float64 sums over the stored weights."""

import logging
from collections.abc import Callable
from dataclasses import replace
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gossamer.core import GossamerError
from gossamer.kernels import PackedConv, SparseConv1x1, build, pack_conv, sparse_conv
from gossamer.kernels.sparse_conv import op
from gossamer.kernels.sparse_conv.module import fold, is_pointwise
from gossamer.kernels.sparse_conv.pack import BLOCKS, best_block, fill

# (outputs, inputs, height, width): one position, less than a vector, whole vectors, odd tails.
SIZES = [
    (1, 1, 1, 1),
    (5, 3, 1, 3),
    (4, 9, 4, 4),
    (7, 33, 5, 7),
    (10, 16, 3, 43),
    (3, 200, 14, 14),
    (66, 12, 17, 19),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(rows: int, columns: int, share: float, block: int = 1, seed: int = 0) -> Tensor:
    """A share of the blocks kept, at random; the scale of a layer's weights."""
    coin = torch.rand(-(-rows // block), columns, generator=torch.Generator().manual_seed(seed))
    kept = (coin < share).repeat_interleave(block, 0)[:rows]
    return torch.where(kept, random(rows, columns, seed=seed) / columns**0.5, 0)


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return conv2d(x.double(), weight.double()[:, :, None, None], bias.double())


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
    monkeypatch.setattr(op.torch, "empty", lambda shape: torch.full(shape, nan))


# ---- packing ------------------------------------------------------------------------------------


def test_what_is_stored_channel_by_channel():
    weight = torch.tensor([[0.0, 5.0, 0.0, 6.0], [7.0, 0.0, 0.0, 8.0], [0.0, 0.0, 9.0, 0.0]])
    bias = torch.tensor([1.0, 2.0, 3.0])
    single = pack_conv(weight, bias, 1).check()
    assert single.values.tolist() == [1, 5, 6, 2, 7, 8, 3, 9]
    assert single.steps.tolist() == [1, 2, 0, 3, 2]
    assert single.start.tolist() == [0, 2, 4, 5]
    pair = pack_conv(weight, bias, 2).check()
    assert pair.values.tolist() == [1, 2, 0, 7, 5, 0, 6, 8, 3, 9]
    assert pair.steps.tolist() == [0, 1, 2, 2]
    assert pair.start.tolist() == [0, 3, 4]
    assert pair.stored()[0].tolist() == [True, True, False, True]
    assert (single.kept, pair.kept) == (5, 7)
    assert single.sparsity == pytest.approx(7 / 12)
    assert single.nbytes == 4 * 8 + 4 * 5 + 8 * 4
    assert "3x4, blocks of 2, sparsity 0.4167" in repr(pair)


@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 40),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    block=st.sampled_from(BLOCKS),
    seed=st.integers(0, 99),
)
def test_unpacking_gives_every_bit_back(
    rows: int, columns: int, share: float, block: int, seed: int
):
    weight, bias = matrix(rows, max(1, columns), share, 1, seed)[:, :columns], random(rows)
    packed = pack_conv(weight, bias, block).check()
    dense, offset = packed.to_dense()
    assert torch.equal(dense, weight)
    assert torch.equal(offset, bias)
    stored = packed.stored()
    assert bool(stored[weight != 0].all())
    cut = rows // block * block
    wide = (
        (weight[:cut] != 0).view(rows // block, block, columns).any(1).repeat_interleave(block, 0)
    )
    assert torch.equal(stored[:cut], wide)
    assert torch.equal(stored[cut:], weight[cut:] != 0)
    assert packed.kept == int(stored.sum())


def test_blocks_are_chosen_by_how_full_they_are():
    four, two = matrix(64, 32, 0.2, 4), matrix(64, 32, 0.2, 2)
    assert [best_block(w) for w in (four, two, matrix(64, 32, 0.2))] == [4, 2, 1]
    assert fill(two != 0, 2) == 2.0
    assert best_block(torch.zeros(8, 8)) == 1
    some = four.clone()
    hit = some.nonzero()[::7]  # one in seven goes: 3.4 of four are left
    some[hit[:, 0], hit[:, 1]] = 0
    assert fill(some != 0, 4) < 3.6
    assert best_block(some) != 4
    assert pack_conv(four).block == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pack_conv(torch.zeros(3)), r"takes weights \(O, I, 1, 1\); got \(3,\)"),
        (lambda: pack_conv(torch.zeros(3, 4, 3, 3)), r"got \(3, 4, 3, 3\)"),
        (lambda: pack_conv(torch.zeros(3, 4), torch.zeros(4)), "3 output channels"),
        (lambda: pack_conv(torch.tensor([[nan, 1.0]])), "1 weights are NaN or infinite"),
        (lambda: pack_conv(torch.zeros(3, 4), block=3), "1, 2 or 4 output channels; got 3"),
    ],
)
def test_what_cannot_be_packed_is_refused(make: Callable[[], PackedConv], message: str):
    with pytest.raises(GossamerError, match=message):
        make()


def test_tensors_that_contradict_one_another_are_noticed():
    packed = pack_conv(matrix(7, 20, 0.4), block=2)
    wrong = [
        replace(packed, block=4),
        replace(packed, block=3),
        replace(packed, shape=(7, 12)),
        replace(packed, steps=packed.steps + 5),
        replace(packed, steps=packed.steps.long()),
        replace(packed, steps=-packed.steps),
        replace(packed, start=packed.start + 1),
        replace(packed, values=packed.values[:-1]),
        replace(packed, values=packed.values.double()),
    ]
    for odd in wrong:
        with pytest.raises(GossamerError):
            odd.check()


# ---- the convolution ----------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block", BLOCKS)
def test_every_size_block_entry_and_instruction_set(block: int, level: int):
    for outputs, inputs, height, width in SIZES:
        for share in (0.0, 0.2, 1.0):
            weight = matrix(outputs, inputs, share, block, seed=outputs)
            bias = random(outputs, seed=1)
            packed = pack_conv(weight, bias, block)
            x = random(3, inputs, height, width, seed=inputs)
            for copies in (0, 1):
                for entry in (x, x.to(memory_format=torch.channels_last)):
                    got = op._run(entry, packed, -inf, inf, level, copies)
                    assert got.is_contiguous()
                    error = (got - exact(x, weight, bias)).abs().max()
                    assert float(error) <= 1e-5, (outputs, inputs, height, width, share, copies)


def test_bias_and_clamp_are_part_of_it(level: int):
    weight, bias, x = matrix(9, 30, 0.3), 3 * random(9), random(2, 30, 5, 5)
    free = exact(x, weight, bias)
    assert bool((free < 0).any())
    assert bool((free > 3).any())
    packed = pack_conv(weight, bias)
    for low, high in ((0.0, 3.0), (0.0, inf), (-inf, 1.0)):
        got = sparse_conv(x, packed, low, high, "cpu", level)
        torch.testing.assert_close(got, free.clamp(low, high).float(), rtol=0, atol=1e-5)
        plain = sparse_conv(x, packed, low, high, "reference")
        torch.testing.assert_close(plain, free.clamp(low, high).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_what_x_holds_where_no_weight_is_stored_has_no_say(block: int, level: int):
    weight = matrix(13, 20, 0.3, block)
    packed = pack_conv(weight, random(13), block)
    x = random(2, 20, 3, 7)
    clean = sparse_conv(x, packed, 0.0, 6.0, "cpu", level)
    x[0, 4, 1, 2], x[1, 7, 2, 6] = nan, inf
    stored = packed.stored()
    for backend in ("cpu", "reference"):
        got = sparse_conv(x, packed, 0.0, 6.0, backend, level if backend == "cpu" else None)
        assert torch.equal(got[0, :, 1, 2].isnan(), stored[:, 4])
        same = torch.ones_like(got, dtype=torch.bool)
        same[0, stored[:, 4], 1, 2] = same[1, stored[:, 7], 2, 6] = False
        torch.testing.assert_close(got[same], clean[same], rtol=0, atol=1e-5)
        infinite = got[1, stored[:, 7], 2, 6]
        assert bool(((infinite == 0) | (infinite == 6)).all())


@pytest.mark.parametrize("pool", ["torch", "own"])
def test_threads_change_no_bit(pool: str, best: int, monkeypatch: pytest.MonkeyPatch):
    if pool == "own":
        monkeypatch.setattr(op, "_parallel", lambda: None)
    for block, (size, images) in zip(BLOCKS, [(14, 1), (29, 2), (5, 9)], strict=True):
        packed = pack_conv(matrix(203, 300, 0.3, block), random(203), block)
        x = random(images, 300, size, size)
        alone = sparse_conv(x, packed, 0.0, 6.0, "cpu")
        for threads in (2, 3):
            monkeypatch.setattr(op.torch, "get_num_threads", lambda count=threads: count)
            assert torch.equal(sparse_conv(x, packed, 0.0, 6.0, "cpu"), alone)
        monkeypatch.setattr(op.torch, "get_num_threads", lambda: 1)


def test_empty_inputs_give_empty_or_constant_results(best: int):
    bias = random(5)
    packed = pack_conv(torch.zeros(5, 8), bias)
    assert sparse_conv(torch.zeros(0, 8, 3, 3), packed, backend="cpu").shape == (0, 5, 3, 3)
    assert sparse_conv(torch.zeros(2, 8, 0, 3), packed, backend="cpu").shape == (2, 5, 0, 3)
    got = sparse_conv(random(2, 8, 3, 3), packed, backend="cpu")
    assert torch.equal(got, bias[None, :, None, None].expand(2, 5, 3, 3))
    assert sparse_conv(random(2, 8), packed, backend="cpu").shape == (2, 5)


def test_strided_inputs_are_made_contiguous_first(best: int):
    weight, bias = matrix(6, 10, 0.5), random(6)
    x = random(2, 10, 8, 8)
    got = sparse_conv(x[:, :, ::2, 1:], pack_conv(weight, bias), backend="cpu")
    torch.testing.assert_close(
        got, exact(x[:, :, ::2, 1:], weight, bias).float(), rtol=0, atol=1e-5
    )


def test_gradients_flow_to_x():
    weight, bias, x = matrix(6, 10, 0.5), random(6), random(2, 10, 3, 3)
    packed = pack_conv(weight, bias)
    got, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    sparse_conv(got, packed, 0.0, 1.0).square().sum().backward()
    conv2d(wanted, weight[:, :, None, None], bias).clamp(0.0, 1.0).square().sum().backward()
    assert bool(wanted.grad.any())
    torch.testing.assert_close(got.grad, wanted.grad)


def test_the_operator_is_known_to_torch():
    packed = pack_conv(matrix(6, 10, 0.5), random(6))
    inputs = (random(1, 10, 2, 3), packed.values, packed.steps, packed.start, 6, 10, 1, 0.0, 6.0)
    torch.library.opcheck(
        torch.ops.gossamer.sparse_conv.default,
        inputs,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_other_dtypes_run_on_the_reference():
    weight, bias, x = matrix(6, 10, 0.5), random(6), random(2, 10, 3, 3)
    packed = pack_conv(weight, bias)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        got = sparse_conv(x.to(dtype), packed)
        assert got.dtype == dtype
        wanted = exact(x.to(dtype), weight, bias)
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    with pytest.raises(GossamerError, match="takes float32 in main memory; got torch.float64"):
        sparse_conv(x.double(), packed, backend="cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: sparse_conv(x[:, 1:], p), r"takes \(N, 10, ...\); got \(2, 9, 3, 3\)"),
        (lambda x, p: sparse_conv(x, p, 1.0, 0.0), "low <= high; got 1.0 and 0.0"),
        (lambda x, p: sparse_conv(x, p, nan), "low <= high"),
        (lambda x, p: sparse_conv(x, p, backend="gpu"), "unknown backend 'gpu'"),
        (lambda x, p: sparse_conv(x, p, backend="cpu", level=7), "levels 0 to"),
    ],
)
def test_impossible_calls_are_refused(call: Callable, message: str, best: int):
    with pytest.raises(GossamerError, match=message):
        call(random(2, 10, 3, 3), pack_conv(matrix(6, 10, 0.5)))


def test_without_a_compiler_the_reference_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    op._library.cache_clear()
    op._usable.cache_clear()
    try:
        weight, bias, x = matrix(6, 10, 0.5), random(6), random(2, 10, 3, 3)
        with caplog.at_level(logging.WARNING, "gossamer"):
            got = sparse_conv(x, pack_conv(weight, bias))
        torch.testing.assert_close(got, exact(x, weight, bias).float(), rtol=0, atol=1e-5)
        assert "sparse conv runs on torch operations" in caplog.text
        with pytest.raises(build.CannotBuild):
            sparse_conv(x, pack_conv(weight, bias), backend="cpu")
    finally:
        op._library.cache_clear()
        op._usable.cache_clear()


# ---- the module ---------------------------------------------------------------------------------


def trained(conv: nn.Conv2d) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A pruned convolution and a normalisation that has seen data."""
    norm = nn.BatchNorm2d(conv.out_channels)
    with torch.no_grad():
        conv.weight.copy_(matrix(conv.out_channels, conv.in_channels, 0.3)[:, :, None, None])
        norm.weight.copy_(random(conv.out_channels, seed=2))
        norm.bias.copy_(random(conv.out_channels, seed=3))
        norm.running_mean.copy_(random(conv.out_channels, seed=4))
        norm.running_var.copy_(random(conv.out_channels, seed=5).square() + 0.1)
    return conv.eval(), norm.eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_normalisation_and_clamp_in_one(bias: bool, stride: int):
    conv, norm = trained(nn.Conv2d(24, 10, 1, stride=stride, bias=bias))
    both = SparseConv1x1.from_conv(conv, norm, 0.0, 6.0)
    x = random(2, 24, 7, 5)
    with torch.no_grad():
        wanted = nn.functional.relu6(norm(conv(x)))
        torch.testing.assert_close(both(x), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(both(x[0]), wanted[0], rtol=0, atol=1e-5)
        alone = SparseConv1x1.from_conv(conv)
        torch.testing.assert_close(alone(x), conv(x), rtol=0, atol=1e-5)
    assert "24, 10, block=1, low=0, high=6" in repr(both)
    assert fold(conv, None)[0].shape == (10, 24)


def test_a_state_travels_between_modules():
    conv, norm = trained(nn.Conv2d(24, 10, 1))
    full = SparseConv1x1.from_conv(conv, norm, 0.0, 6.0, block=2)
    other = SparseConv1x1(pack_conv(torch.zeros(10, 24)), 0.0, 6.0)
    other.load_state_dict(load(save(full.state_dict())))
    x = random(2, 24, 3, 3)
    assert torch.equal(other(x), full(x))
    assert other.block == 2
    with pytest.raises(GossamerError, match="this layer is 9x24"):
        SparseConv1x1(pack_conv(torch.zeros(9, 24))).load_state_dict(full.state_dict())


def test_only_pointwise_convolutions_are_taken():
    assert is_pointwise(nn.Conv2d(4, 8, 1, stride=2))
    for other in (
        nn.Conv2d(4, 8, 3),
        nn.Conv2d(4, 8, 1, groups=2),
        nn.Conv2d(4, 8, 1, padding=1),
        nn.Linear(4, 8),
    ):
        assert not is_pointwise(other)
    with pytest.raises(GossamerError, match="1x1, ungrouped, unpadded"):
        SparseConv1x1.from_conv(nn.Conv2d(4, 8, 3))
    with pytest.raises(GossamerError, match="without running statistics"):
        fold(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, track_running_stats=False))
