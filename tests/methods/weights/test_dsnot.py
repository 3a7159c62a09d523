"""DSnoT against a plain loop over rows, and what its swaps promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import NM, Budget, GossamerError, Site, Stat, Unstructured
from gossamer.methods import make
from gossamer.methods.weights.base import LayerView
from gossamer.methods.weights.dsnot import DSnoT
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.methods.weights.sparsegpt import SparseGPT
from gossamer.methods.weights.wanda import Wanda
from gossamer.models import Tokens, find_sites
from gossamer.recipes.recipe import Recipe
from tests.models.tiny import tiny_model

ROWS, IN = 20, 48
BASES = {"wanda": Wanda(), "magnitude": Magnitude(), "sparsegpt": SparseGPT()}


def problem(seed, rows=ROWS, inputs=IN, constant=()):
    """A layer whose inputs have means and variances of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    x = torch.randn(150, inputs, generator=generator) * torch.rand(inputs, generator=generator)
    x += torch.randn(inputs, generator=generator) / 2
    x[:, list(constant)] = 0.7
    stats = {
        Stat.INPUT_L2: x.norm(dim=0),
        Stat.INPUT_MOMENTS: (x.mean(0), x.var(0, correction=0)),
        Stat.HESSIAN: 2 / len(x) * x.T @ x,
    }
    return LayerView(Site("w", "mlp.up", 0, "w", "weight", (rows, inputs)), weight, stats, 0)


def one_row(dense, values, keep, stats, method, of=None):
    """The algorithm for one row, one step at a time; returns the new mask and the errors."""
    mean, variance = (v.tolist() for v in stats[Stat.INPUT_MOMENTS])
    norm = stats[Stat.INPUT_L2].tolist()
    usual = sum(variance) / len(variance)
    columns = range(len(mean))
    part = [values[j] * mean[j] for j in columns]
    growth = [part[j] / max(variance[j] / usual, 1e-6) ** method.power for j in columns]
    rank = [abs(values[j]) * norm[j] for j in columns]
    error = sum((dense[j] - (values[j] if keep[j] else 0.0)) * mean[j] for j in columns)
    first, moved, skipped, keep = error, set(), set(), list(keep)
    for _ in range(method.max_cycles):
        if abs(error) <= method.threshold * abs(first):
            break
        sign = 1 if error > 0 else -1
        back = [
            j for j in columns if not keep[j] and j not in moved | skipped and part[j] * sign > 0
        ]
        if not back:
            break
        j = max(back, key=lambda j: growth[j] * sign)
        group = columns if of is None else range(j // of * of, j // of * of + of)
        out = [i for i in group if keep[i] and i not in moved and part[i] * sign < 0]
        if not out:
            if of is None:
                break
            skipped.add(j)
            continue
        i = min(out, key=lambda i: rank[i])
        new = error + part[i] - part[j]
        if method.same_sign and new * first <= 0:
            break
        error = new
        keep[i], keep[j] = False, True
        moved |= {i, j}
    return keep, first, error


def expected(layer, method, pattern, budget):
    """Every row by :func:`one_row`: masks, first and last errors."""
    start = BASES[method.base].prune(layer, pattern, budget)
    keep = start.selection.mask()
    new = layer.weight if start.weight is None else start.weight
    values = torch.where(keep, new, layer.weight)
    of = pattern.of if isinstance(pattern, NM) else None
    rows = [
        one_row(*(t[r].double().tolist() for t in (layer.weight, values)), keep[r].tolist(),
                layer.stats, method, of)
        for r in range(len(keep))
    ]  # fmt: skip
    return torch.tensor([row[0] for row in rows]), values, rows


@pytest.mark.parametrize("base", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["row", "layer", "2:4", "1:4", "4:8", "5:6"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"same_sign": False},
        {"power": 0.0, "threshold": 0.0},
        {"max_cycles": 3, "same_sign": False, "threshold": 0.5},
    ],
)
def test_equals_a_plain_loop_over_rows(base, pattern, values):
    layer = problem(len(pattern) + len(base), constant=(5,))
    method = DSnoT(pattern=pattern, base=base, **values)
    form = method.pattern
    budget = Budget(keep=form.keep) if isinstance(form, NM) else Budget(sparsity=0.6)
    mask, kept_values, _ = expected(layer, method, form, budget)
    pruned = method.prune(layer, form, budget)
    assert torch.equal(pruned.selection.mask(), mask)
    if base == "sparsegpt":
        assert torch.equal(pruned.weight, kept_values * mask)
    else:
        assert pruned.weight is None


def error_of(layer, mask):
    mean = layer.stats[Stat.INPUT_MOMENTS][0].double()
    return ((layer.weight.double() * ~mask) @ mean).abs()


@pytest.mark.parametrize("base", ["wanda", "magnitude"])
@pytest.mark.parametrize("same_sign", [False, True])
def test_expected_errors_shrink_below_the_threshold(base, same_sign):
    layer, budget = problem(3, 200, 96), Budget(sparsity=0.5)
    first = BASES[base].prune(layer, Unstructured("row"), budget).selection.mask()
    method = DSnoT(base=base, same_sign=same_sign)
    mask = method.prune(layer, Unstructured("row"), budget).selection.mask()
    before, after = error_of(layer, first), error_of(layer, mask)
    touched = (first != mask).any(1)
    assert touched.float().mean() > 0.5
    smaller = (after[touched] < before[touched]).float().mean()
    assert smaller == 1.0 if same_sign else smaller >= 0.9
    assert after.mean() < 0.7 * before.mean()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 12),
    groups=st.integers(1, 8),
    pattern=st.sampled_from(["row", "1:4", "2:4", "3:4", "2:8"]),
    sparsity=st.floats(0, 1),
    base=st.sampled_from(["wanda", "magnitude", "sparsegpt"]),
    cycles=st.integers(1, 60),
)
def test_counts_never_change(seed, rows, groups, pattern, sparsity, base, cycles):
    layer = problem(seed, rows, groups * 8)
    method = DSnoT(pattern=pattern, base=base, max_cycles=cycles)
    form = method.pattern
    budget = Budget(keep=form.keep) if isinstance(form, NM) else Budget(sparsity=sparsity)
    first = BASES[base].prune(layer, form, budget).selection
    pruned = method.prune(layer, form, budget)
    assert torch.equal(pruned.selection.mask().sum(1), first.mask().sum(1))
    assert pruned.selection.kept == int(pruned.selection.mask().sum()) == first.kept
    swaps = (first.mask() & ~pruned.selection.mask()).sum(1)
    assert int(swaps.max()) <= cycles
    if isinstance(form, NM):
        form.check(pruned.selection)


def test_inputs_without_a_mean_leave_the_mask_alone():
    layer = problem(1)
    mean, variance = layer.stats[Stat.INPUT_MOMENTS]
    layer.stats[Stat.INPUT_MOMENTS] = (torch.zeros_like(mean), variance)
    budget = Budget(sparsity=0.5)
    found = DSnoT().prune(layer, Unstructured("row"), budget)
    assert found.selection == Wanda().prune(layer, Unstructured("row"), budget).selection


def test_a_constant_input_is_the_first_to_come_back():
    """With one swap, every row regrows the weight of the input that never varies if it can."""
    layer = problem(2, constant=(5,))
    layer.weight[:, 5] = 1e-3 * layer.weight[:, 5].sign()  # Small enough to be pruned first.
    budget = Budget(sparsity=0.5)
    first = Wanda().prune(layer, Unstructured("row"), budget).selection.mask()
    assert not first[:, 5].any()
    mean = layer.stats[Stat.INPUT_MOMENTS][0]
    error = (layer.weight * ~first) @ mean
    helps = (layer.weight[:, 5] * mean[5]).sign() == error.sign()
    method = DSnoT(max_cycles=1, same_sign=False)
    mask = method.prune(layer, Unstructured("row"), budget).selection.mask()
    assert helps.any()
    assert mask[helps, 5].all()
    assert not mask[~helps, 5].any()


def test_scaling_all_inputs_changes_nothing():
    layer, budget = problem(4), Budget(sparsity=0.6)
    found = DSnoT().prune(layer, Unstructured("row"), budget).selection
    mean, variance = layer.stats[Stat.INPUT_MOMENTS]
    layer.stats[Stat.INPUT_MOMENTS] = (mean * 64, variance * 64**2)
    layer.stats[Stat.INPUT_L2] *= 64
    assert DSnoT().prune(layer, Unstructured("row"), budget).selection == found


@pytest.mark.parametrize("pattern", ["channels:in", "block:16x16"])
def test_patterns_it_cannot_refine_are_refused(pattern):
    with pytest.raises(GossamerError, match=r"dsnot refines masks by row.*N:M"):
        DSnoT(pattern=pattern)


@pytest.mark.parametrize(
    "values",
    [
        {"base": "lamp"},
        {"max_cycles": 0},
        {"threshold": -0.1},
        {"threshold": float("nan")},
        {"power": -1.0},
    ],
)
def test_impossible_parameters_are_refused(values):
    with pytest.raises(GossamerError, match=next(iter(values))):
        make("dsnot", **values)


# -- on models -----------------------------------------------------------------------------


@pytest.fixture
def tokens():
    ids = torch.randint(3, 128, (4, 20), generator=torch.Generator().manual_seed(0))
    return Tokens.from_ids(ids)


@pytest.mark.parametrize("base", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["uniform", "erk", "global", "owl"])
def test_meets_every_allocation(tokens, base, allocation):
    model = tiny_model("llama")
    method = DSnoT(sparsity=0.6, base=base, allocation=allocation)
    with method.apply(model, tokens) as applied:
        assert applied.report().sparsity == pytest.approx(0.6, abs=1 / 64)


def test_over_sparsegpt_the_survivors_carry_its_values(tokens):
    """In the first block both methods see the same inputs; later streams differ."""
    model = tiny_model("llama")
    dense = {s.name: s.weight(model).clone() for s in find_sites(model).sites}
    stage = {"method": "sparsegpt", "pattern": "2:4"}
    with Recipe.from_dict({"stages": [stage]}).apply(model, None, tokens) as done:
        solved = {n: s.weight(model).clone() for n, s in done.stages[0].sites.items()}
    stage = {"method": "dsnot", "base": "sparsegpt", "pattern": "2:4", "allocation": "owl"}
    with Recipe.from_dict({"stages": [stage]}).apply(model, None, tokens) as done:
        (applied,) = done.stages
        for name, site in applied.sites.items():
            NM(2, 4).check(applied.selection(name))
            if site.block:
                continue
            weight, old = site.weight(model), solved[name]
            both = (weight != 0) & (old != 0)
            assert torch.equal(weight[both], old[both])
            back = (weight != 0) & (old == 0)
            assert torch.equal(weight[back], dense[name][back])
            assert back.any() or "down" in name
    assert all(torch.equal(s.weight(model), dense[s.name]) for s in find_sites(model).sites)


def test_mlp_and_attention_are_both_refined(tokens):
    model = tiny_model("llama")
    method = DSnoT(sparsity=0.5)
    with Wanda(sparsity=0.5).apply(model, tokens) as wanda:
        pass
    with method.apply(model, tokens) as applied:
        changed = {
            applied.sites[n].role.split(".")[0]
            for n in applied.masks
            if not torch.equal(applied.masks[n], wanda.masks[n]) and not applied.sites[n].block
        }
    assert changed == {"attention", "mlp"}


def test_experts_without_tokens_keep_the_first_mask():
    model = tiny_model("mixtral")
    dense = {s.name: s.weight(model).clone() for s in find_sites(model).sites}
    applied = DSnoT(sparsity=0.5).apply(model, Tokens.from_ids(torch.tensor([[3, 5]])))
    unseen = [n.split()[0] for n in applied.report().warnings if "saw no calibration" in n]
    assert unseen
    for name in unseen:
        largest = Unstructured("row").select(dense[name].abs(), Budget(sparsity=0.5))
        assert applied.selection(name) == largest


def test_removed_weights_of_an_already_sparse_model_stay_removed(tokens):
    stages = (make("magnitude", sparsity=0.6, pattern="row"), make("dsnot", sparsity=0.5))
    model = tiny_model("llama")
    before = Recipe(stages=stages).apply(model, None, tokens).stages[0]
    for name, site in before.sites.items():
        assert not site.weight(model)[~before.selection(name).mask()].any()
