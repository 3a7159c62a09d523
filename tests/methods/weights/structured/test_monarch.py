"""Monarch factors against the dense matrix they stand for, and the projection against theory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.weights.structured.monarch import (
    MonarchLinear,
    MonarchShape,
    multiply_out,
    project,
)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive(left, right, shape):
    """y_(l, j) = sum over k, b, i of R[j, l, k b] L[k, j b, i], one number at a time."""
    J = K = shape.nblocks
    made = torch.zeros(shape.rows * J, shape.columns * K, dtype=left.dtype)
    for j in range(J):
        for k in range(K):
            for r in range(shape.rank):
                column = right[j, :, k * shape.rank + r]
                row = left[k, j * shape.rank + r]
                for out in range(shape.rows):
                    for i in range(shape.columns):
                        made[out * J + j, k * shape.columns + i] += column[out] * row[i]
    return made[: shape.out_features, : shape.in_features]


def error(matrix, made):
    return float((torch.linalg.norm(matrix - made) / torch.linalg.norm(matrix)).detach())


def projected(matrix, nblocks, rank):
    shape = MonarchShape(matrix.shape[1], matrix.shape[0], nblocks, rank)
    return multiply_out(*project(matrix, shape), shape)


SHAPES = [(16, 16, 4, 1), (12, 8, 2, 3), (7, 10, 3, 2), (9, 4, 4, 1), (5, 5, 1, 2)]


class TestShape:
    @pytest.mark.parametrize(("o", "i", "nblocks", "rank"), SHAPES)
    def test_parameters_are_those_of_the_factors(self, o, i, nblocks, rank):
        shape = MonarchShape(i, o, nblocks, rank)
        assert shape.parameters == math.prod(shape.left) + math.prod(shape.right)

    def test_paper_counts(self):
        n = 64
        assert MonarchShape(n, n, 8, 1).parameters == 2 * n * 8  # 2 n sqrt(n)
        four = MonarchShape.choose(n, n, 4)
        assert four.rank == 4
        assert four.sparsity == 0.5  # 2 / nblocks remain

    @given(st.integers(4, 200), st.integers(4, 200), st.integers(1, 4), st.floats(0, 0.99))
    def test_sparsity_asked_for_is_reached_with_the_largest_rank(self, o, i, nblocks, sparsity):
        shape = MonarchShape.choose(i, o, nblocks, sparsity=sparsity)
        assert shape.rank == 1 or shape.sparsity >= sparsity - 1e-6
        if shape.rank < shape.full_rank:
            more = MonarchShape(i, o, nblocks, shape.rank + 1)
            assert more.sparsity < sparsity + 1e-6

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ((8, 8, 9, 1), "nblocks is 9"),
            ((8, 8, 2, 5), "rank is 5"),
            ((8, 8, 0, 1), "nblocks is 0"),
            ((8, 8, 2, 0), "rank is 0"),
        ],
    )
    def test_impossible_shapes_are_refused(self, values, message):
        with pytest.raises(GossamerError, match=message):
            MonarchShape(*values)

    def test_two_amounts_are_refused(self):
        with pytest.raises(GossamerError, match="give one"):
            MonarchShape.choose(8, 8, 2, rank=1, sparsity=0.5)


class TestProjection:
    @pytest.mark.parametrize(("o", "i", "nblocks", "rank"), SHAPES)
    def test_multiplying_out_is_the_definition(self, o, i, nblocks, rank):
        shape = MonarchShape(i, o, nblocks, rank)
        left, right = random(*shape.left), random(*shape.right, seed=1)
        torch.testing.assert_close(multiply_out(left, right, shape), naive(left, right, shape))

    @pytest.mark.parametrize(
        ("o", "i", "nblocks", "rank"), [(16, 16, 4, 1), (32, 48, 4, 3), (20, 10, 2, 2)]
    )
    def test_error_is_the_theory(self, o, i, nblocks, rank):
        """Squared error: the slices' squared singular values beyond the rank."""
        matrix = random(o, i)
        missed, columns = 0.0, i // nblocks
        for j in range(nblocks):
            for k in range(nblocks):
                part = matrix[j::nblocks, k * columns : (k + 1) * columns]
                missed += float(torch.linalg.svdvals(part)[rank:].square().sum())
        found = float((matrix - projected(matrix, nblocks, rank)).square().sum())
        assert found == pytest.approx(missed, rel=1e-12)

    def test_gradient_vanishes_at_the_projection(self):
        """No small change of the factors comes nearer; larger random ones neither."""
        shape = MonarchShape(12, 8, 2, 2)
        matrix = random(8, 12)
        left, right = (f.requires_grad_() for f in project(matrix, shape))
        lost = (matrix - multiply_out(left, right, shape)).square().sum()
        for slope in torch.autograd.grad(lost, (left, right)):
            assert float(slope.abs().max()) < 1e-12
        left, right, lost = left.detach(), right.detach(), lost.detach()
        for seed in range(20):
            other = multiply_out(
                left + 0.1 * random(*left.shape, seed=seed),
                right + 0.1 * random(*right.shape, seed=seed + 100),
                shape,
            )
            assert float((matrix - other).square().sum()) > float(lost)

    @pytest.mark.parametrize(("o", "i", "nblocks", "rank"), SHAPES)
    def test_a_monarch_matrix_is_recovered(self, o, i, nblocks, rank):
        shape = MonarchShape(i, o, nblocks, rank)
        matrix = multiply_out(random(*shape.left), random(*shape.right, seed=1), shape)
        assert error(matrix, projected(matrix, nblocks, rank)) < 1e-12

    def test_full_rank_is_exact(self):
        matrix = random(13, 9)
        shape = MonarchShape(9, 13, 3, 3)
        assert shape.rank == shape.full_rank
        assert error(matrix, projected(matrix, 3, 3)) < 1e-12

    def test_fourier_needs_the_permutation(self):
        order = torch.arange(16, dtype=torch.float64)
        fourier = torch.polar(
            torch.ones(16, 16).double(), -2 * math.pi / 16 * torch.outer(order, order)
        )
        bits = torch.tensor([int(f"{c:04b}"[::-1], 2) for c in range(16)])
        assert error(fourier[:, bits], projected(fourier[:, bits], 4, 1)) < 1e-12
        assert error(fourier, projected(fourier, 4, 1)) == pytest.approx(math.sqrt(0.75), rel=1e-9)

    def test_half_precision_is_computed_in_float32(self):
        matrix = random(16, 16, dtype=torch.bfloat16)
        shape = MonarchShape(16, 16, 4, 2)
        for rough, fine in zip(project(matrix, shape), project(matrix.float(), shape), strict=True):
            assert rough.dtype == torch.bfloat16
            torch.testing.assert_close(rough, fine.bfloat16())

    def test_bad_weights_are_refused(self):
        shape = MonarchShape(4, 4, 2, 1)
        with pytest.raises(GossamerError, match="NaN"):
            project(torch.full((4, 4), float("nan")), shape)
        with pytest.raises(GossamerError, match="weight is"):
            project(torch.zeros(4, 5), shape)


class TestLayer:
    @pytest.mark.parametrize(("o", "i", "nblocks", "rank"), SHAPES)
    @pytest.mark.parametrize("bias", [True, False])
    def test_forward_is_the_dense_product(self, o, i, nblocks, rank, bias):
        layer = MonarchLinear(i, o, bias, nblocks=nblocks, rank=rank, dtype=torch.float64)
        x = random(2, 3, i)
        expected = x @ naive(layer.left.detach(), layer.right.detach(), layer.shape).T
        if bias:
            expected = expected + layer.bias
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.to_linear()(x), expected)

    def test_gradients_are_those_of_the_dense_product(self):
        layer = MonarchLinear(10, 7, nblocks=3, rank=2, dtype=torch.float64)
        x, sent = random(5, 10).requires_grad_(), random(5, 7, seed=1)
        layer(x).backward(sent)
        found = [x.grad, layer.left.grad, layer.right.grad, layer.bias.grad]
        own = [
            p.detach().clone().requires_grad_() for p in (x, layer.left, layer.right, layer.bias)
        ]
        (own[0] @ multiply_out(own[1], own[2], layer.shape).T + own[3]).backward(sent)
        for ours, theirs in zip(found, own, strict=True):
            torch.testing.assert_close(ours, theirs.grad)

    @pytest.mark.parametrize("shape", [(10,), (0, 10), (2, 0, 10)])
    def test_any_leading_shape(self, shape):
        layer = MonarchLinear(10, 7, nblocks=3)
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 7)

    def test_bfloat16(self):
        layer = MonarchLinear(32, 48, nblocks=4).bfloat16()
        x = random(6, 32, dtype=torch.bfloat16)
        assert layer(x).dtype == torch.bfloat16
        expected = x.float() @ layer.dense().float().T + layer.bias.float()
        assert error(expected, layer(x).float()) < 0.02

    def test_drawing_keeps_the_scale_of_a_linear_layer(self):
        torch.manual_seed(0)
        layer = MonarchLinear(1024, 1024, False, nblocks=4)
        assert float(layer.left.detach().abs().max()) <= 1 / 16
        assert float(layer.left.detach().std()) == pytest.approx(1 / 16 / math.sqrt(3), rel=0.02)

    def test_is_smaller(self):
        layer = MonarchLinear(64, 64, nblocks=8)
        assert sum(p.numel() for p in layer.parameters()) == 64 + 64 * 64 // 4

    def test_factors_of_another_shape_are_refused(self):
        shape = MonarchShape(8, 8, 2, 1)
        with pytest.raises(GossamerError, match="left is"):
            MonarchLinear.from_factors(shape, torch.zeros(2, 2, 5), torch.zeros(shape.right), None)

    def test_no_random_number_is_used_up(self):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        MonarchLinear.from_dense(torch.eye(8), torch.zeros(8), nblocks=2)
        assert torch.equal(torch.rand(3), expected)
