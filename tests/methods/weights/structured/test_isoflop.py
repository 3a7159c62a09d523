"""The four iso-FLOP forms: cost, function, masks, initialisation, decay."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.weights.structured.isoflop import (
    MaskedLinear,
    SparseDoped,
    SparseFactorized,
    SparseParallel,
    sparse_wide,
)
from gossamer.methods.weights.structured.masked import folded_decay, masked_modules
from gossamer.methods.weights.structured.sizes import (
    doped_rank,
    factorized_width,
    parallel_branches,
    wide_factor,
)

SPARSITIES = (0.5, 0.75, 0.9)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(kind, i, o, sparsity, bias=True, **options):
    if kind == "wide":
        return MaskedLinear(
            i, round(wide_factor(sparsity, 1) * o), bias, kept=i * o, generator=generator()
        )
    kinds = {"parallel": SparseParallel, "factorized": SparseFactorized, "doped": SparseDoped}
    return kinds[kind](i, o, bias, sparsity=sparsity, generator=generator(), **options)


KINDS = ("wide", "parallel", "factorized", "doped")


class TestSizes:
    def test_worked_numbers(self):
        assert wide_factor(0.75) == 2.0
        assert wide_factor(0.75, sides=1) == 4.0
        assert [parallel_branches(s) for s in SPARSITIES] == [2, 4, 10]
        assert factorized_width(100, 300, 0.75) == 300
        assert factorized_width(4, 4, 0.0) == 2
        assert doped_rank(100, 300, 0.9) == 67  # floor(67.5)
        assert doped_rank(100, 300, 0.0) == 0

    @pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.72])
    def test_branches_are_whole(self, sparsity):
        with pytest.raises(GossamerError, match="branches"):
            parallel_branches(sparsity)


class TestCost:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("sparsity", SPARSITIES)
    @pytest.mark.parametrize(("i", "o"), [(256, 256), (256, 768), (768, 96)])
    def test_multiply_adds_are_within_two_percent_of_dense(self, kind, sparsity, i, o):
        layer = build(kind, i, o, sparsity)
        counted = sum(
            int(torch.count_nonzero(p)) for n, p in layer.named_parameters() if n != "bias"
        )
        assert layer.multiply_adds() == counted
        assert abs(counted / (i * o) - 1) <= 0.02
        assert layer.sparsity == pytest.approx(sparsity, abs=2e-3)

    @pytest.mark.parametrize("sparsity", SPARSITIES)
    def test_a_wide_network_costs_what_the_dense_one_costs(self, sparsity):
        widths = (64, 300, 100, 10)
        layers = sparse_wide(widths, sparsity, generator=generator())
        sides = list(pairwise(widths))
        assert [m.multiply_adds() for m in layers] == [a * b for a, b in sides]
        assert layers[0].in_features == 64
        assert layers[-1].out_features == 10
        # Between hidden widths the layer is sparse at s, at the borders at 1 - sqrt(1 - s).
        assert layers[1].sparsity == pytest.approx(sparsity, abs=5e-3)
        assert layers[0].sparsity == pytest.approx(1 - math.sqrt(1 - sparsity), abs=5e-3)

    def test_a_network_without_hidden_widths_is_refused(self):
        with pytest.raises(GossamerError, match="hidden width"):
            sparse_wide((3, 4), 0.5)


class TestFunction:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bias", [True, False])
    def test_forward_is_the_folded_matrix(self, kind, bias):
        layer = build(kind, 24, 18, 0.75, bias).double()
        if bias:
            nn.init.normal_(layer.bias)
        x = torch.randn(2, 5, 24, generator=generator(1)).double()
        expected = x @ layer.dense().T
        torch.testing.assert_close(layer(x), expected + layer.bias if bias else expected)

    def test_nonlinear_forms_by_hand(self):
        x = torch.randn(7, 12, generator=generator(1)).double()
        two = build("parallel", 12, 8, 0.75, activation="relu").double()
        expected = sum((x @ two.weight[j].T).relu() for j in range(4)) + two.bias
        torch.testing.assert_close(two(x), expected)
        one = build("factorized", 12, 8, 0.75, activation="relu").double()
        torch.testing.assert_close(one(x), (x @ one.U.T).relu() @ one.V.T + one.bias)
        for layer in (one, two):
            with pytest.raises(GossamerError, match="no matrix"):
                layer.dense()

    @pytest.mark.parametrize("kind", KINDS)
    def test_outputs_start_with_the_variance_of_the_gain(self, kind):
        for sparsity in SPARSITIES:
            layer = build(kind, 512, 512, sparsity, False)
            x = torch.randn(256, 512, generator=generator(2))
            with torch.no_grad():
                assert float(layer(x).var()) == pytest.approx(2.0, rel=0.1)

    def test_one_masked_weight_variance(self):
        """Normal weights of variance gain² / (fan-in (1 - s)) where kept."""
        layer = MaskedLinear(400, 300, False, kept=12_000, gain=3.0, generator=generator())
        kept = layer.weight.detach()[layer.weight_mask]
        assert len(kept) == 12_000
        assert float(kept.var()) == pytest.approx(9.0 / 40, rel=0.05)


class TestMasks:
    @pytest.mark.parametrize("kind", KINDS)
    def test_masked_weights_stay_out_whatever_the_optimizer_does(self, kind):
        layer = build(kind, 16, 12, 0.75)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            layer(torch.randn(8, 16)).square().sum().backward()
            optimizer.step()
        for weight, mask in layer.pairs():
            assert not weight.detach()[~mask].any()
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[weight][moment][~mask].any()

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradient_reaches_masked_weights_only_on_request(self, kind):
        layer = build(kind, 16, 12, 0.75)
        x = torch.randn(8, 16, generator=generator(3))
        values, slopes = [], []
        for wanted in (False, True):
            layer.dense_gradient = wanted
            layer.zero_grad()
            y = layer(x)
            y.square().sum().backward()
            values.append(y.detach())
            slopes.append([(p.grad[~m], p.grad[m]) for p, m in layer.pairs()])
        assert torch.equal(*values)
        for (out, kept), (dense_out, dense_kept) in zip(*slopes, strict=True):
            assert not out.any()
            assert dense_out.any()
            torch.testing.assert_close(kept, dense_kept)

    def test_values_written_under_a_mask_do_not_count(self):
        layer = build("wide", 16, 12, 0.75)
        x = torch.randn(4, 16)
        before = layer(x)
        with torch.no_grad():
            layer.weight.masked_fill_(~layer.weight_mask, 7.0)
        assert torch.equal(layer(x), before)
        layer.enforce()
        assert int(torch.count_nonzero(layer.weight)) == int(layer.weight_mask.sum())

    @pytest.mark.parametrize("kind", KINDS)
    def test_masks_survive_copies_and_casts(self, kind):
        layer = build(kind, 16, 12, 0.5)
        fresh = build(kind, 16, 12, 0.5)
        for weight, mask in fresh.pairs():
            mask.fill_(False)
            weight.detach().zero_()
        fresh.load_state_dict(layer.state_dict())
        for other in (copy.deepcopy(layer), fresh):
            for (a, ma), (b, mb) in zip(layer.pairs(), other.pairs(), strict=True):
                assert torch.equal(a, b)
                assert torch.equal(ma, mb)
        half = copy.deepcopy(layer).bfloat16()
        assert half(torch.randn(3, 16).bfloat16()).dtype == torch.bfloat16
        assert half.multiply_adds() == layer.multiply_adds()

    def test_seeds_draw_other_masks(self):
        a, b = (MaskedLinear(16, 16, kept=64, generator=generator(s)) for s in (0, 1))
        assert not torch.equal(a.weight_mask, b.weight_mask)


class TestDecay:
    def test_norms_are_those_of_products(self):
        net = nn.Sequential(build("parallel", 12, 8, 0.5), build("factorized", 8, 6, 0.5))
        parallel, factorized = masked_modules(net)
        by_hand = parallel.weight.sum(0).square().sum()
        by_hand = by_hand + (factorized.V @ factorized.U).square().sum()
        assert float(folded_decay(net, 0.1).detach()) == pytest.approx(
            float(0.05 * by_hand.detach()), rel=1e-6
        )

    def test_doped_counts_both_parts(self):
        layer = build("doped", 12, 8, 0.5)
        by_hand = layer.weight.square().sum() + (layer.V @ layer.U).square().sum()
        assert float(folded_decay(layer, 2.0).detach()) == pytest.approx(
            float(by_hand.detach()), rel=1e-6
        )

    def test_the_gradient_is_that_of_the_product(self):
        """Opposite branches cancel in their sum, so they are not pulled to zero."""
        layer = build("parallel", 4, 4, 0.5, False)
        with torch.no_grad():
            layer.weight_mask.fill_(True)
            layer.weight[1] = -layer.weight[0]
        folded_decay(layer, 1.0).backward()
        assert not layer.weight.grad.any()

    def test_without_masks_there_is_none(self):
        assert float(folded_decay(nn.Linear(3, 3), 1.0)) == 0.0
