"""SparseGPT against optimal brain surgeon column by column, and what its masks promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import NM, Budget, GossamerError, Site, Stat, Unstructured
from gossamer.methods import make
from gossamer.methods.weights.base import LayerView
from gossamer.methods.weights.compensate import factorise
from gossamer.methods.weights.sparsegpt import SparseGPT
from gossamer.methods.weights.wanda import Wanda
from gossamer.models import Tokens, find_sites
from gossamer.recipes.recipe import Recipe
from tests.models.tiny import tiny_model

OUT, IN = 12, 24


def layer(weight, hessian):
    site = Site("layer", "mlp.up", 0, "layer", "weight", tuple(weight.shape))
    norm = hessian.diagonal().sqrt()
    return LayerView(site, weight, {Stat.HESSIAN: hessian, Stat.INPUT_L2: norm}, 0)


def correlated(seed, inputs=IN, tokens=200):
    """Inputs with strong correlations and one loud channel, as H = (2 / T) sum of x xᵀ."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) + torch.eye(inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ mix
    x[:, 3] *= 30
    return 2 / tokens * x.T @ x


def problem(seed, rows=OUT, inputs=IN):
    generator = torch.Generator().manual_seed(seed + 100)
    return torch.randn(rows, inputs, generator=generator), correlated(seed, inputs)


def surgeon(weight, hessian, damping, block, pattern, keep):
    """Optimal brain surgeon in fp64, every inverse formed anew; (mask, new weight).

    ``keep`` is the number kept of a block (layer), of a block's row (row), or of a group (N:M),
    as a function of the block's first and last column.
    """
    w, h = weight.double().clone(), hessian.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    columns = len(h)
    mask = torch.ones_like(w, dtype=torch.bool)
    pivots = torch.stack([torch.linalg.inv(h[j:, j:])[0, 0] for j in range(columns)])
    step = pattern.of if isinstance(pattern, NM) else block
    for j in range(columns):
        if j % step == 0:
            end = min(j + step, columns)
            saliency = w[:, j:end] ** 2 / pivots[j:end]
            if pattern == Unstructured("layer"):
                saliency = saliency.reshape(1, -1)
            order = saliency.argsort(1, descending=True)[:, : keep(j, end)]
            chosen = torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, order, True)
            mask[:, j:end] = chosen.view(len(w), -1)
        inverse = torch.linalg.inv(h[j:, j:])
        error = torch.where(mask[:, j], 0.0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
        w[:, j] = torch.where(mask[:, j], w[:, j], 0.0)
    return mask, w


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("pattern", "block"),
    [
        *(("layer", 8), ("layer", 7), ("layer", 128), ("row", 8), ("row", 5), ("row", 1)),
        *(("2:4", 8), ("2:4", 128), ("2:4", 3), ("1:3", 7), ("6:8", 8), ("5:24", 128)),
    ],
)
def test_equals_optimal_brain_surgeon(pattern, block, seed):
    weight, hessian = problem(seed)
    method = SparseGPT(pattern=pattern, block_size=block)
    form = method.pattern
    if isinstance(form, NM):
        budget, keep = Budget(keep=form.keep), lambda *_: form.keep
    else:
        budget = Budget(sparsity=0.6)
        total = round(0.4 * IN * (OUT if pattern == "layer" else 1))
        keep = lambda a, b: total * b // IN - total * a // IN  # noqa: E731
    pruned = method.prune(layer(weight, hessian), form, budget)
    mask, expected = surgeon(weight, hessian, 0.01, min(block, IN), form, keep)
    assert torch.equal(pruned.selection.mask(), mask)
    torch.testing.assert_close(pruned.weight.double(), expected, atol=2e-4, rtol=2e-4)
    assert pruned.warnings == ()


def test_blocks_change_the_order_of_work_and_not_a_fixed_mask():
    """With 2:4 the decisions do not depend on the block, so neither may the values."""
    weight, hessian = problem(5, 16, 64)
    found = [
        SparseGPT(pattern="2:4", block_size=b).prune(layer(weight, hessian), NM(), Budget(keep=2))
        for b in (4, 12, 20, 64)
    ]
    for other in found[1:]:
        assert other.selection == found[0].selection
        torch.testing.assert_close(other.weight, found[0].weight, atol=1e-4, rtol=1e-4)


def error_of(weight, pruned, hessian):
    lost = (weight - pruned).double()
    return float(((lost @ hessian.double()) * lost).sum())


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
def test_the_update_pays(pattern):
    weight, hessian = problem(1, 64, 96)
    view = layer(weight, hessian)
    form = SparseGPT(pattern=pattern).pattern
    budget = Budget(keep=2) if isinstance(form, NM) else Budget(sparsity=0.6)
    pruned = SparseGPT().prune(view, form, budget)
    wanda = Wanda().prune(view, form, budget)
    own = error_of(weight, pruned.weight, hessian)
    assert own < 0.8 * error_of(weight, weight * wanda.selection.mask(), hessian)
    assert own < 0.8 * error_of(weight, weight * pruned.selection.mask(), hessian)


@pytest.mark.parametrize("block", [8, 24])
def test_independent_inputs_give_wandas_order_and_no_update(block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator)
    power = torch.rand(IN, generator=generator) * 9 + 1
    view = layer(weight, torch.diag(power))
    pruned = SparseGPT(block_size=block, damping=1e-7).prune(
        view, Unstructured("layer"), Budget(sparsity=0.5)
    )
    score = Wanda().score(view)
    for start in range(0, IN, block):
        own = Unstructured("layer").select(score[:, start : start + block], Budget(sparsity=0.5))
        assert torch.equal(pruned.selection.mask()[:, start : start + block], own.mask())
    assert torch.equal(pruned.weight, weight * pruned.selection.mask())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    inputs=st.integers(1, 40),
    block=st.integers(1, 50),
    sparsity=st.floats(0, 1),
    per=st.sampled_from(["row", "layer"]),
    zeros=st.floats(0, 0.9),
)
def test_counts_are_exact_and_zeros_stay(rows, inputs, block, sparsity, per, zeros):
    weight, hessian = problem(rows, rows, inputs) if inputs > 3 else problem(rows, rows, 4)
    weight, hessian = weight[:, :inputs], hessian[:inputs, :inputs]
    zero = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < zeros
    weight = weight.masked_fill(zero, 0)
    budget = Budget(sparsity=sparsity)
    pruned = SparseGPT(block_size=block).prune(layer(weight, hessian), Unstructured(per), budget)
    mask = pruned.selection.mask()
    if per == "row":
        assert (mask.sum(1) == budget.count(inputs)).all()
    assert pruned.selection.kept == int(mask.sum())
    if per == "layer":
        assert pruned.selection.kept == budget.count(rows * inputs)
    assert not pruned.weight[~mask].any()
    assert not pruned.weight[zero].any()
    if sparsity == 0:
        assert torch.equal(pruned.weight, weight)


def test_zeros_go_first():
    weight, hessian = problem(2, 8, 32)
    weight[:, ::4] = 0
    pruned = SparseGPT().prune(layer(weight, hessian), Unstructured("row"), Budget(sparsity=0.5))
    assert not pruned.selection.mask()[:, ::4].any()


def test_dead_inputs_go_first_and_disturb_nothing():
    weight, hessian = problem(3)
    dead = torch.zeros(IN, dtype=torch.bool)
    dead[[0, 7, 23]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    budget = Budget(sparsity=0.5)
    pruned = SparseGPT().prune(layer(weight, hessian), Unstructured("row"), budget)
    assert pruned.warnings == ()
    assert not pruned.selection.mask()[:, dead].any()
    # The rest as if the dead inputs did not exist, three fewer to remove.
    rest = SparseGPT().prune(
        layer(weight[:, ~dead], hessian[~dead][:, ~dead]), Unstructured("row"), Budget(keep=12)
    )
    assert torch.equal(pruned.selection.mask()[:, ~dead], rest.selection.mask())
    torch.testing.assert_close(pruned.weight[:, ~dead], rest.weight, atol=1e-5, rtol=1e-5)
    # Those that a small budget leaves keep their value.
    kept = SparseGPT().prune(layer(weight, hessian), Unstructured("row"), Budget(keep=23))
    mask = kept.selection.mask()
    assert torch.equal(kept.weight[:, dead][mask[:, dead]], weight[:, dead][mask[:, dead]])


def test_damping_is_raised_until_the_hessian_is_positive_definite():
    negative = torch.diag(torch.cat([torch.ones(IN - 1), torch.tensor([-0.05])]))
    found = factorise(negative, 0.01)
    assert "0.1 was used" in found.warnings[0]
    product = found.upper @ found.upper.T
    damped = negative + 0.1 * negative.diagonal().mean() * torch.eye(IN)
    torch.testing.assert_close(product, damped)
    assert torch.equal(found.upper, found.upper.triu())


def test_a_hopeless_hessian_is_pruned_by_its_diagonal_and_said_so():
    weight, hessian = problem(0)
    own = hessian.diagonal()
    hessian = torch.diag(own) + 500 * own.max() * (1 - torch.eye(IN))
    view = layer(weight, hessian)
    pruned = SparseGPT().prune(view, Unstructured("row"), Budget(sparsity=0.5))
    assert len(pruned.warnings) == 1
    assert "without compensation" in pruned.warnings[0]
    wanda = Wanda().prune(view, Unstructured("row"), Budget(sparsity=0.5))
    assert pruned.selection == wanda.selection
    assert torch.equal(pruned.weight, weight * wanda.selection.mask())


def test_factor_and_inverse_diagonal():
    hessian = correlated(4)
    found = factorise(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(IN)
    torch.testing.assert_close(
        found.inverse_diagonal().double(), torch.linalg.inv(damped).diagonal(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("pattern", ["channels:in", "channels:out", "block:16x16", "window:4+8"])
def test_patterns_it_cannot_do_are_refused(pattern):
    with pytest.raises(GossamerError, match=r"sparsegpt prunes by row.*N:M"):
        SparseGPT(pattern=pattern)


@pytest.mark.parametrize(
    "values", [{"block_size": 0}, {"damping": 0.0}, {"damping": float("nan")}, {"damping": 2.0}]
)
def test_impossible_parameters_are_refused(values):
    with pytest.raises(GossamerError, match=next(iter(values))):
        SparseGPT(**values)


# -- on models -----------------------------------------------------------------------------


@pytest.fixture
def tokens():
    ids = torch.randint(3, 128, (4, 20), generator=torch.Generator().manual_seed(0))
    return Tokens.from_ids(ids)


@pytest.mark.parametrize("allocation", ["er", "erk", "lamp", "global", "owl"])
@pytest.mark.parametrize("pattern", ["row", "layer"])
def test_meets_every_allocation(tokens, allocation, pattern):
    made = SparseGPT(sparsity=0.6, allocation=allocation, pattern=pattern)
    with made.apply(tiny_model("llama"), tokens) as applied:
        assert applied.report().sparsity == pytest.approx(0.6, abs=1 / 64)


def test_model_wide_competition_is_one_of_saliencies(tokens):
    with SparseGPT(sparsity=0.6, pattern="model").apply(tiny_model("llama"), tokens) as applied:
        total = sum(site.size for site in applied.sites.values())
        assert sum(applied.kept.values()) == pytest.approx(0.4 * total, abs=len(applied.kept))
        assert len({row.sparsity for row in applied.report().rows}) > 5


def test_layers_that_share_an_input_share_one_factor(tokens, monkeypatch):
    made = []

    def counting(hessian, damping):
        made.append(len(hessian))
        return factorise(hessian, damping)

    monkeypatch.setattr("gossamer.methods.weights.sparsegpt.factorise", counting)
    SparseGPT().apply(tiny_model("llama"), tokens)
    assert len(made) == 2 * 4  # q k v together, o, gate and up together, down


def test_conv1d_is_pruned_along_its_inputs(tokens):
    model = tiny_model("gpt2")
    with SparseGPT(pattern="2:4").apply(model, tokens) as applied:
        for site in find_sites(model).sites:
            if site.name in applied.masks:
                groups = (site.weight(model) != 0).reshape(-1, 4).sum(1)
                assert (groups == 2).all()


def test_experts_without_tokens_are_pruned_by_magnitude_and_named():
    model = tiny_model("mixtral")
    dense = {s.name: s.weight(model).clone() for s in find_sites(model).sites}
    applied = SparseGPT(pattern="2:4").apply(model, Tokens.from_ids(torch.tensor([[3, 5]])))
    unseen = [n.split()[0] for n in applied.report().warnings if "saw no calibration" in n]
    assert unseen
    for name in unseen:
        weight = applied.sites[name].weight(model)
        largest = NM(2, 4).select(dense[name].abs()).mask()
        assert torch.equal(weight, dense[name] * largest)


def test_warnings_reach_the_report_with_the_layers_name(tokens, monkeypatch):
    def broken(hessian, damping):
        return factorise(hessian - 1e6 * torch.ones_like(hessian), damping)

    monkeypatch.setattr("gossamer.methods.weights.sparsegpt.factorise", broken)
    model = tiny_model("llama")
    report = SparseGPT().apply(model, tokens).report()
    assert len(report.warnings) == len(report.rows)
    assert report.warnings[0].startswith(report.rows[0].name + ": Hessian not positive definite")


def test_half_precision_models_are_solved_in_float32(tokens):
    model = tiny_model("llama").to(torch.bfloat16)
    dense = {s.name: s.weight(model).clone() for s in find_sites(model).sites}
    with SparseGPT(pattern="2:4").apply(model, tokens) as applied:
        for name in applied.masks:
            weight = applied.sites[name].weight(model)
            assert weight.dtype == torch.bfloat16
            assert torch.isfinite(weight).all()
            NM(2, 4).check(applied.selection(name))
    assert all(torch.equal(s.weight(model), dense[s.name]) for s in find_sites(model).sites)


def test_an_already_sparse_model_is_not_revived(tokens):
    stages = (
        make("magnitude", sparsity=0.6, pattern="row"),
        make("sparsegpt", sparsity=0.5, pattern="row"),
    )
    model = tiny_model("llama")
    done = Recipe(stages=stages).apply(model, None, tokens)
    before = done.stages[0]
    for name in before.masks:
        weight = before.sites[name].weight(model)
        assert not weight[~before.selection(name).mask()].any()


def test_owl_and_sparsegpt_at_two_to_four_from_a_recipe(tokens):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:3] *= 40
    recipe = Recipe.from_dict(
        {"stages": [{"method": "sparsegpt", "pattern": "4:8", "allocation": "owl"}]}
    )
    with recipe.apply(model, None, tokens) as done:
        (applied,) = done.stages
        for name in applied.masks:
            counts = applied.selection(name).mask().reshape(-1, 8).sum(1)
            assert len(counts.unique()) == 1
        kept = {row.block: 1 - row.sparsity for row in applied.report().rows}
        assert kept[0] > kept[1]
