from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from gossamer.core import GossamerError
from gossamer.methods.control.base import Affine
from gossamer.methods.control.lineas import LinEAS, prox, quantiles, sorted_distance, transport
from gossamer.methods.features.editing import gathered
from tests.models.subjects import SUBJECTS

IT = SUBJECTS["steered language model"]
FEW = LinEAS(source="0", target="1", steps=30, lr=0.05)


def rows(count, wide, seed):
    return torch.randn(count, wide, generator=torch.Generator().manual_seed(seed))


def test_distance_ignores_the_order_of_texts():
    x, y = rows(7, 3, 0), rows(7, 3, 1)
    assert torch.equal(sorted_distance(x, y), sorted_distance(x[torch.randperm(7)], y))
    assert sorted_distance(x, x.flip(0)) == 0


def test_distance_of_single_columns():
    x = torch.tensor([[0.0, 5.0], [4.0, 5.0]])
    y = torch.tensor([[5.0, 6.0], [1.0, 8.0]])
    assert sorted_distance(x, y).item() == pytest.approx((1 + 1) / 2 + (1 + 9) / 2)


@given(st.integers(1, 9), st.integers(1, 9))
def test_quantiles_keep_range_and_equal_counts(first, second):
    x = rows(first, 2, first)
    found = quantiles(x, second)
    assert found.shape == (second, 2)
    assert (found.diff(dim=0) >= -1e-6).all()
    assert (found.amax(0) <= x.amax(0) + 1e-6).all()
    assert torch.equal(quantiles(x, first), x.sort(dim=0).values)


def test_unequal_counts_meet_at_interpolated_ranks():
    # Doubling every text changes no distribution.
    y = rows(6, 2, 1)
    assert quantiles(torch.tensor([[0.0], [1.0]]), 4)[:, 0].tolist() == [0, 0.25, 0.75, 1]
    assert quantiles(y.repeat_interleave(3, 0), 6).allclose(y.sort(dim=0).values)


@pytest.mark.parametrize("weights", [(0.3, 0.0), (0.0, 0.2), (0.2, 0.1), (9.0, 0.0), (0.0, 9.0)])
def test_prox_minimises_what_it_says(weights):
    lasso, group = weights
    v, step = rows(1, 4, 3)[0], 0.7

    def cost(u):
        penalty = lasso * np.abs(u).sum() + group * 2 * np.linalg.norm(u)
        return 0.5 * ((u - v.numpy()) ** 2).sum() + step * penalty

    found = prox(v, step, lasso, group).numpy()
    other = minimize(cost, found + 0.01, method="Nelder-Mead", options={"xatol": 1e-6})
    assert cost(found) <= other.fun + 1e-5


def test_transport_is_least_squares_on_sorted_pairs():
    x = rows(20, 2, 0)
    y = (3 * x - 1)[torch.randperm(20)]
    law = transport(x, y)
    assert torch.allclose(law.scale, torch.full((2,), 3.0), atol=1e-4)
    assert torch.allclose(law.shift, torch.full((2,), -1.0), atol=1e-4)
    assert transport(torch.ones(4, 1), torch.full((4, 1), 3.0)).shift.item() == pytest.approx(2)


def test_steps_bring_the_texts_closer_with_all_maps_in_force():
    model, data = IT.build(), IT.data()
    paths = FEW.paths(model)
    source, target = data.where("label", "0"), data.where("label", "1")
    wanted = gathered(model, target, paths, "mean")

    def distance():
        found = gathered(model, source, paths, "mean")
        return float(sum(sorted_distance(found[p], wanted[p]) for p in paths))

    before = distance()
    with FEW.apply(model, data) as work:
        # Hooks of later modules run after the maps, so this sees what the model computes with them.
        assert distance() < 0.5 * before
        assert f"{before:.4f} before" in work.report().notes[0]


def test_a_lasso_leaves_coordinates_exactly_alone():
    with replace(FEW, lasso=1e6).apply(IT.build(), IT.data()) as work:
        assert work.report().sparsity == 1
    shares = []
    for lasso in (0.0, 0.5):
        with replace(FEW, lasso=lasso).apply(IT.build(), IT.data()) as work:
            shares.append(work.report().sparsity)
            for edit in work.intervention.edits:
                assert isinstance(edit.law, Affine)
    assert shares[0] == 0
    assert 0 < shares[1] < 1


def test_a_group_penalty_drops_whole_layers():
    with replace(FEW, group=1e3).apply(IT.build(), IT.data()) as work:
        assert work.report().sparsity == 1


def test_strength_zero_is_the_model():
    model = IT.build()
    plain = IT.outputs(model)
    with replace(FEW, strength=0.0).apply(model, IT.data()):
        assert torch.allclose(IT.outputs(model), plain, atol=1e-6)


def test_modules_by_pattern():
    model = IT.build()
    assert FEW.paths(model) == tuple(f"model.layers.{i}.post_attention_layernorm" for i in range(2))
    assert replace(FEW, hooks="*.1.mlp, *.0").paths(model) == (
        "model.layers.0",
        "model.layers.1.mlp",
    )
    with pytest.raises(GossamerError, match="no module matches"):
        replace(FEW, hooks="layers.9").paths(model)


@pytest.mark.parametrize(
    "values", [{"lr": 0.0}, {"lr": float("nan")}, {"steps": 0}, {"lasso": -1.0}, {"group": -1.0}]
)
def test_bad_parameters(values):
    with pytest.raises(GossamerError, match=next(iter(values))):
        LinEAS(**values)


def test_bad_texts():
    model, data = IT.build(), IT.data()
    with pytest.raises(GossamerError, match="name two values"):
        LinEAS(source="1", target="1").apply(model, data)
    with pytest.raises(GossamerError, match="lower lr"):
        replace(FEW, lr=1e30).apply(model, data)
