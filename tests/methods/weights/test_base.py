"""The weights protocol: allocation, masks, undo, and what each shipped method selects."""

import pytest
import torch

from gossamer.core import GossamerError, Stat
from gossamer.core import allocate as split
from gossamer.core.scores import lamp
from gossamer.methods import make
from gossamer.methods.weights.lamp import LAMP
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.methods.weights.random import Random
from gossamer.methods.weights.wanda import Wanda
from gossamer.models import Tokens, at_work, find_sites, stream
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def tokens():
    return Tokens.from_ids(
        torch.randint(3, 128, (4, 20), generator=torch.Generator().manual_seed(0))
    )


def weights(model):
    return {site.name: site.weight(model).clone() for site in find_sites(model).sites}


def test_magnitude_keeps_the_largest_of_each_row(model):
    before = weights(model)
    with Magnitude(sparsity=0.25, pattern="row").apply(model) as applied:
        for site in find_sites(model).sites:
            keep = round(0.75 * site.shape[1])
            cut = before[site.name].abs().sort(dim=1, descending=True).values[:, keep - 1 : keep]
            expected = torch.where(before[site.name].abs() >= cut, before[site.name], 0.0)
            assert torch.equal(site.weight(model), expected)
            assert torch.equal(applied.selection(site.name).mask(), expected != 0)


def test_global_magnitude_is_one_competition(model):
    before = torch.cat([w.abs().flatten() for w in weights(model).values()])
    with Magnitude(sparsity=0.6, pattern="model").apply(model) as applied:
        after = torch.cat([w.flatten() for w in weights(model).values()])
        keep = round(0.4 * len(before))
        assert int((after != 0).sum()) == keep == sum(applied.kept.values())
        assert after[after != 0].abs().min() >= before.sort(descending=True).values[keep - 1]


def test_lamp_is_a_competition_of_lamp_scores(model):
    scores = {name: lamp(w) for name, w in weights(model).items()}
    everything = torch.cat([s.flatten() for s in scores.values()])
    cut = everything.sort(descending=True).values[round(0.3 * len(everything)) - 1]
    with LAMP(sparsity=0.7).apply(model) as applied:
        for name, score in scores.items():
            assert torch.equal(applied.selection(name).mask(), score >= cut)
    with Magnitude(sparsity=0.7, pattern="layer", allocation="lamp").apply(model) as same:
        assert same.kept == applied.kept
        assert all(torch.equal(same.masks[n], applied.masks[n]) for n in applied.masks)


def test_erk_gives_each_layer_its_share(model):
    shapes = {site.name: site.shape for site in find_sites(model).sites}
    shares = split.erk(shapes, 0.8)
    with Magnitude(sparsity=0.8, allocation="erk").apply(model) as applied:
        assert len(set(applied.kept.values())) > 1
        for row in applied.report().rows:
            assert row.sparsity == pytest.approx(shares[row.name], abs=1 / row.size)
        assert applied.report().sparsity == pytest.approx(0.8, abs=1e-3)


def test_wanda_scores_with_norms_of_the_pruned_stream(model, tokens):
    """The second block's norms come from the first block as pruned, not as it was."""
    dense = {}

    def remember(block):
        dense.update({n: s[Stat.INPUT_L2].clone() for n, s in block.stats.items()})

    stream(model, tokens, frozenset({Stat.INPUT_L2}), remember, recompute=False)
    before = weights(model)
    Wanda(sparsity=0.5).apply(model, tokens)
    after = {}

    def again(block):
        after.update({n: s[Stat.INPUT_L2].clone() for n, s in block.stats.items()})

    stream(model, tokens, frozenset({Stat.INPUT_L2}), again, recompute=False)
    first, second = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    assert torch.equal(dense[first], after[first])
    assert not torch.allclose(dense[second], after[second], rtol=1e-3)
    for name in (first, second):
        score = before[name].abs() * after[name]
        cut = score.sort(dim=1, descending=True).values[:, 15:16]
        kept = next(s for s in find_sites(model).sites if s.name == name).weight(model) != 0
        assert torch.equal(kept, score >= cut)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "block:16x16", "channels:in", "row"])
@pytest.mark.parametrize("method", ["random", "magnitude", "wanda"])
def test_every_score_meets_every_pattern(model, tokens, method, pattern):
    made = make(method, pattern=pattern, **({} if ":" in pattern[:2] else {"sparsity": 0.5}))
    with made.apply(model, tokens) as applied:
        for name in applied.masks:
            made.pattern.check(applied.selection(name))
        assert applied.report().sparsity == pytest.approx(made.sparsity, abs=1e-6)


@pytest.mark.parametrize("allocation", ["er", "erk", "lamp", "global", "owl"])
@pytest.mark.parametrize("method", ["random", "magnitude", "wanda"])
def test_every_score_meets_every_allocation(model, tokens, method, allocation):
    with make(method, sparsity=0.6, allocation=allocation).apply(model, tokens) as applied:
        # Rows of 32 round their own counts: half a weight in 32 at most.
        assert applied.report().sparsity == pytest.approx(0.6, abs=1 / 64)


def test_owl_keeps_the_block_with_outliers_denser(model, tokens):
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:3] *= 40
    applied = Wanda(sparsity=0.7, allocation="owl").apply(model, tokens)
    by_block = [[r.sparsity for r in applied.report().rows if r.block == b] for b in (0, 1)]
    assert max(by_block[0]) < min(by_block[1])
    assert applied.report().sparsity == pytest.approx(0.7, abs=0.02)


def test_nm_follows_an_allocation_by_varying_n(model, tokens):
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:3] *= 40
    method = Wanda(sparsity=0.5, pattern="4:8", allocation="owl")
    applied = method.apply(model, tokens)
    for name in applied.masks:
        counts = applied.selection(name).mask().reshape(-1, 8).sum(1)
        assert len(counts.unique()) == 1
    kept = {r.block: 1 - r.sparsity for r in applied.report().rows}
    assert kept[0] > kept[1]


def test_a_pattern_fixes_its_sparsity():
    assert Wanda(pattern="2:4").sparsity == 0.5
    assert Wanda(pattern="1:4").sparsity == 0.75
    assert Wanda(sparsity=0.5, pattern="2:4").sparsity == 0.5
    with pytest.raises(GossamerError, match="fixes the sparsity at 0.5"):
        Wanda(sparsity=0.7, pattern="2:4")


def test_a_pattern_that_does_not_divide_is_refused_before_anything_changes(model):
    before = weights(model)
    with pytest.raises(GossamerError, match=r"layers\.0.*divisible by 5"):
        Magnitude(pattern="2:5").apply(model)
    after = weights(model)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_nan_weights_are_named_and_nothing_changes(model):
    before = weights(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(GossamerError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        Magnitude(sparsity=0.5, pattern="row").apply(model)
    with pytest.raises(GossamerError, match=r"layers\.1\.mlp\.up_proj: 1 of 2048 weights"):
        Wanda(sparsity=0.5).apply(model, random_tokens())
    for site in find_sites(model).sites:
        if "layers.1.mlp.up_proj" not in site.name:
            assert torch.equal(site.weight(model), before[site.name])


def test_skipped_layers_stay_dense_and_out_of_the_budget(model):
    before = weights(model)
    applied = Magnitude(sparsity=0.5, skip="attention, *.layers.1.mlp.down_proj").apply(model)
    names = [row.name for row in applied.report().rows]
    assert len(names) == 5
    assert applied.report().sparsity == 0.5
    for name, weight in weights(model).items():
        assert torch.equal(weight, before[name]) == (name not in names)


def test_a_skipped_block_has_no_share_of_an_allocation(model):
    method = Wanda(sparsity=0.5, allocation="owl", skip="*.layers.1.*")
    report = method.apply(model, random_tokens()).report()
    assert {row.block for row in report.rows} == {0}
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("skip", "match"),
    [("mlp.dwn", "did you mean mlp.down"), ("attention,mlp", "leaves no layer")],
)
def test_skips_that_match_nothing_or_all_are_refused(model, skip, match):
    with pytest.raises(GossamerError, match=match):
        Magnitude(skip=skip).apply(model)


def test_layers_sparser_than_asked_for_are_told(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, 4:] = 0
    report = Magnitude(sparsity=0.5).apply(model).report()
    assert "1 of 14 layers are sparser than asked for" in report.notes[0]
    assert "layers.0.mlp.up_proj (87.5%)" in report.notes[0]


def test_unknown_allocations_and_conflicts_are_refused():
    with pytest.raises(GossamerError, match="allocation is 'lamb'"):
        Magnitude(allocation="lamb")
    with pytest.raises(GossamerError, match="nothing to split"):
        Magnitude(pattern="model", allocation="erk")


def test_random_layers_draw_from_their_own_streams(model):
    with Random(sparsity=0.5, seed=1).apply(model) as applied:
        first = applied.selection("model.layers.0.mlp.up_proj").mask()
        second = applied.selection("model.layers.1.mlp.up_proj").mask()
        assert not torch.equal(first, second)


def test_masks_hold_after_an_optimizer_step_when_enforced(model, tokens):
    applied = Magnitude(sparsity=0.5).apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(input_ids=tokens.input_ids, labels=tokens.input_ids).loss.backward()
    optimizer.step()
    site = find_sites(model).sites[0]
    mask = applied.selection(site.name).mask()
    assert site.weight(model)[~mask].any()
    applied.enforce()
    assert not site.weight(model)[~mask].any()
    assert not site.weight(model.to(torch.bfloat16))[~mask].any()


def test_without_undo_nothing_is_kept_and_restore_says_so(model):
    applied = Magnitude(sparsity=0.5).apply(model, undo=False)
    assert not applied._removed
    with pytest.raises(GossamerError, match="load the model again"):
        applied.restore()


def test_experts_without_tokens_fall_back_to_magnitude_and_say_so():
    model = tiny_model("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[2:] -= 100.0
    tokens = Tokens.from_ids(torch.randint(3, 128, (1, 4)))
    applied = Wanda(sparsity=0.5).apply(model, tokens)
    assert applied.report().sparsity == pytest.approx(0.5)
    unseen = [note for note in applied.report().warnings if "saw no calibration token" in note]
    for note in unseen:
        site = next(s for s in find_sites(model).sites if s.name == note.split()[0])
        assert int((site.weight(model) != 0).sum(1).unique()) == site.shape[1] // 2


def test_bytes_saved_count_the_mask(model):
    with Magnitude(sparsity=0.5, pattern="row").apply(model) as applied:
        sizes = [s.size for s in find_sites(model).sites]
        assert applied.weight_bytes_saved() == sum(n * 4 - (n // 2 * 4 + n // 8) for n in sizes)
    with Magnitude(sparsity=0.0).apply(model) as applied:
        assert applied.weight_bytes_saved() == 0


def test_restoring_out_of_order_is_refused(model):
    before = weights(model)
    first = Magnitude(sparsity=0.3).apply(model)
    second = Magnitude(sparsity=0.7).apply(model)
    with pytest.raises(GossamerError, match="restore that first"):
        first.restore()
    second.restore()
    first.restore()
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())


def test_saving_what_was_restored_is_refused(model, tmp_path):
    applied = Magnitude(sparsity=0.5).apply(model)
    applied.restore()
    with pytest.raises(GossamerError, match="apply it again"):
        applied.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_that_do_not_fit_the_weights_are_refused(model):
    applied = Magnitude(sparsity=0.5).apply(model)
    state = applied.state()
    applied.restore()
    with pytest.raises(GossamerError, match="changed after saving"):
        applied.method.reattach(model, state.meta, state.tensors)
    assert not at_work(model)
