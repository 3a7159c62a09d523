"""Allocations: totals, order, and what each rule promises of single layers."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core import Budget, GossamerError, Unstructured, allocate, kept_count
from gossamer.core.scores import lamp as lamp_score

SHAPES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    min_size=1,
    max_size=6,
)
SPARSITY = st.floats(0, 0.995)


def sizes_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}


def layers(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = {"a": (40, 20), "b": (16, 64), "c": (8, 8)}
    return {
        name: torch.randn(shape, generator=generator) * (i + 1) ** 2
        for i, (name, shape) in enumerate(sides.items())
    }


def masks(scores: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    chosen = Unstructured("model").select_model(scores, Budget(sparsity=sparsity))
    return {name: selection.mask() for name, selection in chosen.items()}


@pytest.mark.parametrize("rule", [allocate.uniform, allocate.er, allocate.erk])
@given(shapes=SHAPES, sparsity=SPARSITY)
def test_shape_rules_meet_the_budget(rule, shapes: dict[str, tuple[int, ...]], sparsity: float):
    shares = rule(shapes, sparsity)
    sizes = sizes_of(shapes)
    assert list(shares) == list(shapes)
    assert all(0.0 <= share <= 1.0 for share in shares.values())
    target = (1 - sparsity) * sum(sizes.values())
    assert abs(allocate.kept_total(shares, sizes) - target) <= len(shapes)


@given(shapes=SHAPES, low=SPARSITY, high=SPARSITY)
def test_erk_is_monotone_in_the_sparsity(
    shapes: dict[str, tuple[int, ...]], low: float, high: float
):
    low, high = sorted((low, high))
    loose, tight = allocate.erk(shapes, low), allocate.erk(shapes, high)
    assert all(tight[name] >= loose[name] - 1e-9 for name in shapes)


def test_er_by_hand():
    # Densities e * (4+4)/16 and e * (8+8)/64, sizes 16 and 64: e * 24 = 40, e * 0.5 = 0.83.
    shares = allocate.er({"small": (4, 4), "large": (8, 8)}, 0.5)
    assert shares["small"] == pytest.approx(1 - 5 / 6)
    assert shares["large"] == pytest.approx(1 - 5 / 12)


def test_er_freezes_layers_at_dense_and_solves_again():
    shares = allocate.er({"tiny": (2, 2), "huge": (100, 100)}, 0.1)
    assert shares["tiny"] == 0.0
    assert (1 - shares["huge"]) * 10_000 + 4 == pytest.approx(0.9 * 10_004)


def test_kernels_count_for_erk_only():
    shapes = {"conv": (8, 8, 3, 3), "linear": (24, 24)}
    er, erk = allocate.er(shapes, 0.5), allocate.erk(shapes, 0.5)
    assert er["conv"] != pytest.approx(erk["conv"])
    density = {name: 1 - share for name, share in erk.items()}
    assert density["conv"] / density["linear"] == pytest.approx((22 / 576) / (48 / 576))
    linear = {"a": (24, 8), "b": (32, 16)}
    assert allocate.er(linear, 0.5) == pytest.approx(allocate.erk(linear, 0.5))


@pytest.mark.parametrize("rule", [allocate.uniform, allocate.er, allocate.erk])
def test_nothing_to_allocate_and_nonsense(rule):
    assert rule({}, 0.5) == {}
    with pytest.raises(GossamerError, match="sparsity"):
        rule({"a": (2, 2)}, 1.0)


@given(SPARSITY)
def test_global_counts_are_those_of_one_competition(sparsity: float):
    scores = {name: weight.abs() for name, weight in layers().items()}
    shares = allocate.global_(scores, sparsity)
    won = masks(scores, sparsity)
    for name, score in scores.items():
        assert kept_count(score.numel(), shares[name]) == int(won[name].sum())


def test_lamp_keeps_its_mask_when_a_layer_is_rescaled_and_global_does_not():
    weights = layers()
    scaled = {**weights, "a": weights["a"] * 1000}
    before = masks({n: lamp_score(w) for n, w in weights.items()}, 0.9)
    after = masks({n: lamp_score(w) for n, w in scaled.items()}, 0.9)
    assert all(torch.equal(before[name], after[name]) for name in weights)
    before = masks({n: w.abs() for n, w in weights.items()}, 0.9)
    after = masks({n: w.abs() for n, w in scaled.items()}, 0.9)
    assert not torch.equal(before["a"], after["a"])
    assert int(after["c"].sum()) == 0


def test_lamp_empties_no_layer_while_there_is_one_weight_for_each():
    weights = {**layers(), "a": layers()["a"] * 1e-8}
    total = sum(weight.numel() for weight in weights.values())
    shares = allocate.lamp(weights, 1 - 3 / total)
    assert [kept_count(weights[n].numel(), shares[n]) for n in weights] == [1, 1, 1]


# -- OWL -----------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5000)), min_size=1, max_size=8),
    st.floats(0, 0.99),
    st.floats(0, 0.5),
)
def test_owl_meets_the_mean_exactly(
    blocks: list[tuple[float, int]], sparsity: float, spread: float
):
    outliers = {str(i): share for i, (share, _) in enumerate(blocks)}
    sizes = {str(i): size for i, (_, size) in enumerate(blocks)}
    shares = allocate.owl(outliers, sizes, sparsity, spread)
    total = sum(sizes.values())
    assert sum(shares[n] * sizes[n] for n in sizes) / total == pytest.approx(sparsity, abs=1e-6)
    assert all(0.0 <= share <= 1.0 for share in shares.values())
    ranked = sorted(outliers, key=lambda n: outliers[n])
    assert all(shares[b] <= shares[a] + 1e-12 for a, b in pairwise(ranked))


def test_owl_range_is_two_spreads_and_the_loudest_block_is_densest():
    shares = allocate.owl({"a": 0.01, "b": 0.05, "c": 0.03}, dict.fromkeys("abc", 10), 0.7, 0.08)
    assert shares == pytest.approx({"a": 0.78, "b": 0.62, "c": 0.70})
    assert allocate.spread_of(shares) == pytest.approx((0.62, 0.78))


def test_owl_equal_shares_are_uniform_and_clipping_keeps_the_budget():
    assert allocate.owl({"a": 0.2, "b": 0.2}, {"a": 5, "b": 9}, 0.6) == {"a": 0.6, "b": 0.6}
    shares = allocate.owl({"a": 0.0, "b": 1.0}, {"a": 300, "b": 100}, 0.05, 0.5)
    assert shares["b"] == 0.0
    assert shares["a"] * 300 == pytest.approx(0.05 * 400)


@pytest.mark.parametrize("spread", [-0.1, 0.6])
def test_owl_refuses_a_spread_outside_its_range(spread: float):
    with pytest.raises(GossamerError, match="spread"):
        allocate.owl({"a": 0.1}, {"a": 1}, 0.5, spread)


@given(
    shares=st.dictionaries(st.text("abcdef", min_size=1, max_size=3), SPARSITY, min_size=1),
    of=st.sampled_from([2, 4, 8, 16]),
    data=st.data(),
)
def test_groups_are_whole_and_within_the_budget(shares: dict[str, float], of: int, data):
    sizes = {name: data.draw(st.integers(1, 50)) * 64 for name in shares}
    kept = {name: (1 - share) * of for name, share in allocate.grouped(shares, sizes, of).items()}
    assert list(kept) == list(shares)
    for name, count in kept.items():
        assert abs(count - round(count)) < 1e-9
        assert 1 <= round(count) <= of
        assert abs(count - (1 - shares[name]) * of) < 1 or count == 1
    budget = sum((1 - shares[name]) * sizes[name] for name in shares)
    least = sum(sizes.values()) / of
    assert sum(kept[n] / of * sizes[n] for n in kept) <= max(budget, budget + least) + 1e-6


def test_groups_of_a_worked_allocation():
    # Wanted 2.6, 1.8 and 1.6 of 4: the two largest remainders fit into the budget of 6.
    shares = {"a": 0.35, "b": 0.55, "c": 0.6}
    found = allocate.grouped(shares, dict.fromkeys(shares, 100), 4)
    assert found == {"a": 0.25, "b": 0.5, "c": 0.75}
    # A layer too big for what is left keeps its number.
    found = allocate.grouped(shares, {"a": 400, "b": 4000, "c": 100}, 4)
    assert found == {"a": 0.25, "b": 0.75, "c": 0.5}


def test_uniform_plus_leaves_the_first_layer_dense_and_the_last_at_a_fifth():
    shapes = {"first": (10, 10), "a": (40, 40), "b": (40, 40), "last": (10, 40)}
    shares = allocate.uniform_plus(shapes, 0.9)
    assert shares["first"] == 0.0
    assert shares["last"] == pytest.approx(0.8)
    assert shares["a"] == shares["b"]
    kept = 100 + 0.2 * 400 + (1 - shares["a"]) * 3200
    assert kept == pytest.approx(0.1 * 3700)


def test_uniform_plus_treats_the_last_layer_alike_where_its_floor_does_not_bind():
    shapes = {"first": (10, 10), "a": (40, 40), "last": (10, 40)}
    shares = allocate.uniform_plus(shapes, 0.5)
    assert shares["a"] == pytest.approx(shares["last"])
    assert 100 + (1 - shares["a"]) * 2000 == pytest.approx(0.5 * 2100)


def test_uniform_plus_refuses_what_its_dense_layers_alone_exceed():
    with pytest.raises(GossamerError, match="leaves nothing to the layers between"):
        allocate.uniform_plus({"first": (64, 64), "a": (8, 8), "last": (8, 8)}, 0.9)
