from itertools import islice

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.measure import matched_cosine, score_rows
from gossamer.methods.features.rules import ReLU, TopK
from gossamer.methods.features.toy import Superposition
from gossamer.methods.features.training import Recipe, Trainer, geometric_median, train

BED = Superposition(d_in=16, atoms=24, active=2.0)


def fit(seed=0, steps=250, rule=None, compute=None, **options):
    recipe = Recipe(steps=steps, batch_size=128, lr=6e-3, seed=seed, **options)
    batches = BED.batches(128, seed=seed)
    return train(batches, width=48, rule=rule or TopK(2), recipe=recipe, compute=compute)


def trainer(rule=None, **options):
    options = {"steps": 40, "batch_size": 64, **options}
    sample = next(BED.batches(512))
    return Trainer(sample, width=48, rule=rule or TopK(2), recipe=Recipe(**options))


def test_a_short_training_finds_the_true_atoms():
    made = fit()
    score = score_rows(made, islice(BED.batches(1024, seed=99), 2))
    assert matched_cosine(made.W_dec, BED.true_atoms()) > 0.9
    assert score.fvu < 0.25
    assert 1.5 < score.l0 <= 2.0


def test_equal_seeds_agree_exactly_and_others_do_not():
    first, again, other = fit(steps=20), fit(steps=20), fit(seed=1, steps=20)
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not torch.equal(other.W_dec, first.W_dec)


def test_the_global_random_state_plays_no_part():
    torch.manual_seed(1)
    first, before = fit(steps=5), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(fit(steps=5).W_dec, first.W_dec)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_atoms_have_norm_one_after_every_step():
    work = trainer()
    for rows in islice(BED.batches(64), 10):
        work.step(rows)
        torch.testing.assert_close(
            work.dictionary.W_dec.detach().norm(dim=1), torch.ones(48), rtol=0, atol=1e-6
        )


def test_a_step_has_no_gradient_along_an_atom():
    work = trainer()
    work.step(next(BED.batches(64)))
    atoms, grad = work.dictionary.W_dec, work.dictionary.W_dec.grad
    assert float(grad.norm()) > 0
    # The gradient was made orthogonal to the atoms as they were before the step.
    fresh = trainer().dictionary.W_dec.detach()
    along = (grad * fresh).sum(1).abs()
    assert float(along.max()) < 1e-5 * float(grad.norm())
    assert not torch.equal(atoms, fresh)


def test_latents_die_after_the_window_and_live_when_they_fire():
    work = trainer(rule=TopK(1), dead_after=100)
    rows = next(BED.batches(64)) * work.scale
    work.loss(rows)
    assert not len(work.dead())
    work.loss(rows)
    fired = work.dictionary.codes(rows).fired().unique().tolist()
    assert set(work.dead().tolist()) == set(range(48)) - set(fired)


def test_the_scale_gives_inputs_a_mean_norm_of_sqrt_d():
    sample = next(BED.batches(512))
    work = trainer()
    mean = float((sample * work.scale).norm(dim=1).mean())
    assert mean == pytest.approx(4.0, rel=1e-5)


def test_training_does_not_depend_on_the_units_of_the_input():
    recipe = Recipe(steps=60, batch_size=64, lr=5e-3)

    def run(scale):
        batches = (scale * rows for rows in BED.batches(64))
        return train(batches, width=48, rule=TopK(2), recipe=recipe)

    x = next(BED.batches(256, seed=9))
    small, large = run(1.0), run(64.0)
    torch.testing.assert_close(large(64.0 * x) / 64.0, small(x), rtol=1e-4, atol=1e-4)


def test_an_l1_penalty_makes_codes_sparse_and_small():
    loose, tight = fit(steps=150, rule=ReLU(0.1)), fit(steps=150, rule=ReLU(6.0))
    few, many = (score_rows(d, [next(BED.batches(1024, seed=7))]) for d in (tight, loose))
    assert few.l0 < 0.7 * many.l0
    assert few.shrinkage < many.shrinkage


def test_the_rate_rises_and_falls():
    recipe = Recipe(steps=100, batch_size=10, warmup=9, decay=0.2).resolved(16, 2**14)
    assert recipe.lr == pytest.approx(2e-4)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(9) == recipe.rate(80) == 1.0
    assert recipe.rate(90) == pytest.approx(0.5)
    assert 0 < recipe.rate(99) < 0.1


def test_open_values_follow_the_run():
    recipe = Recipe(steps=1000, batch_size=100).resolved(32, 2**12)
    assert recipe.lr == pytest.approx(4e-4)
    assert (recipe.aux_k, recipe.dead_after, recipe.warmup) == (16, 5000, 50)
    long = Recipe(steps=10**6, batch_size=10**4).resolved(32, 64)
    assert (long.dead_after, long.warmup) == (10_000_000, 1000)


def test_geometric_median_is_not_the_mean():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [100.0, 100.0], [0.2, 0.2]])
    point = geometric_median(rows)
    cost = (rows - point).norm(dim=1).sum()
    for shift in torch.eye(2) * 0.05:
        assert (rows - point - shift).norm(dim=1).sum() >= cost
        assert (rows - point + shift).norm(dim=1).sum() >= cost
    assert float(point.max()) < 1


def test_progress_counts_every_step():
    seen = []
    recipe = Recipe(steps=3, batch_size=64)
    train(
        BED.batches(64),
        width=48,
        rule=TopK(2),
        recipe=recipe,
        progress=lambda *what: seen.append(what[:2]),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_training_works_where_gradients_are_off():
    with torch.no_grad():
        made = fit(steps=2)
    assert torch.equal(made.W_dec, fit(steps=2).W_dec)


def test_zero_activations_are_refused():
    with pytest.raises(GossamerError, match="all activations are zero"):
        Trainer(torch.zeros(8, 4), width=8, rule=TopK(1), recipe=Recipe(steps=1, batch_size=8))


def joined(second, seed=0):
    """Rows of two sites: the bed's, and a turned copy of them in other units."""
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
    return (torch.cat([rows, second * rows @ turn], 1) for rows in BED.batches(128, seed=seed))


def test_sites_of_a_crosscoder_weigh_alike_whatever_their_units():
    recipe = Recipe(steps=150, batch_size=128, lr=6e-3)

    def run(second):
        return train(joined(second), width=48, rule=TopK(2), recipe=recipe, sites=(16, 16))

    small, large = run(1.0), run(64.0)
    x, y = next(joined(1.0, seed=9)), next(joined(64.0, seed=9))
    units = torch.cat([torch.ones(16), torch.full((16,), 64.0)])
    torch.testing.assert_close(large(y) / units, small(x), rtol=1e-3, atol=1e-3)
    for site in (slice(0, 16), slice(16, 32)):
        missed = (y - large(y))[:, site].square().sum()
        assert float(missed / (y - y.mean(0))[:, site].square().sum()) < 0.5
    with pytest.raises(GossamerError, match="32 columns"):
        train(joined(1.0), width=48, rule=TopK(2), recipe=recipe, sites=(16, 8))


def test_half_precision_computes_and_float32_is_kept():
    half = fit(steps=60, compute=torch.bfloat16)
    plain = fit(steps=60)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float32}
    rows = [next(BED.batches(1024, seed=7))]
    assert score_rows(half, rows).fvu < 1.1 * score_rows(plain, rows).fvu + 0.01
    assert not torch.equal(half.W_dec, plain.W_dec)


def test_a_training_that_diverges_says_so():
    work = trainer()
    work._fvu = torch.tensor(float("nan"))
    work.done = 3
    with pytest.raises(GossamerError, match="NaN after 3 of 40 steps; lower lr"):
        work.glance()
