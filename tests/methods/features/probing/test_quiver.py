import pytest
import torch

from gossamer.core import GossamerError, SparseRows
from gossamer.methods.features.probing.probes import Components, Logistic, Rows, SparseProbe
from gossamer.methods.features.probing.quiver import AMOUNTS, Shot, Task, draw, gain, shoot

LABELS = torch.arange(200) % 4 == 0


def test_amounts_are_the_papers():
    assert (AMOUNTS["scarcity"][0], AMOUNTS["scarcity"][-1]) == (2, 1024)
    assert AMOUNTS["imbalance"] == pytest.approx([0.05 * i for i in range(1, 20)])
    assert len(AMOUNTS["noise"]) == 11


def test_scarcity_draws_as_many_of_each_class():
    at, shown = draw(LABELS, "scarcity", 16, seed=0)
    assert (len(at), int(shown.sum())) == (16, 8)
    assert torch.equal(LABELS[at], shown)
    assert len(at.unique()) == 16


def test_imbalance_keeps_the_share_and_at_least_two():
    at, shown = draw(LABELS, "imbalance", 0.9, seed=0)
    assert float(shown.double().mean()) == pytest.approx(0.9, abs=0.03)
    _, rare = draw(LABELS, "imbalance", 0.05, seed=0, size=20)
    assert int(rare.sum()) == 2
    assert torch.equal(LABELS[at], shown)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_noise_flips_the_same_share_of_both_classes(share):
    at, shown = draw(LABELS, "noise", share, seed=1, size=80)
    flipped = LABELS[at] != shown
    assert int(flipped[LABELS[at]].sum()) == round(40 * share)
    assert int(flipped[~LABELS[at]].sum()) == round(40 * share)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(GossamerError, match="positive rows wanted"):
        draw(LABELS, "scarcity", 128, seed=0)
    with pytest.raises(GossamerError, match="scarcity"):
        draw(LABELS, "scarceness", 8, seed=0)


def shot(name, validation, test, task="a"):
    return Shot(task, "noise", 0.1, validation, test, frozenset({name}))


def test_the_pick_is_by_validation_and_ties_go_to_baselines():
    one = shot("s", {"b": 0.8, "s": 0.9}, {"b": 0.9, "s": 0.7})
    assert (one.pick(sparse=True), one.pick(sparse=False)) == ("s", "b")
    assert one.gain == pytest.approx(-0.2)
    tie = shot("s", {"b": 0.9, "s": 0.9}, {"b": 0.6, "s": 1.0})
    assert tie.gain == 0


def test_gain_is_a_mean_with_an_interval_over_tasks():
    shots = [
        shot("s", {"b": 0.5, "s": 0.9}, {"b": 0.5, "s": 0.5 + g}, task)
        for task, g in (("a", 0.1), ("a", 0.3), ("b", 0.0))
    ]
    found = gain(shots)
    assert found.value == pytest.approx(0.4 / 3)
    assert (found.low, found.high) == (pytest.approx(0.0), pytest.approx(0.2))
    with pytest.raises(GossamerError, match="no shot"):
        gain([])


def task(latent_tells):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    codes = torch.rand(200, 30, generator=generator)
    if latent_tells:
        codes[:, 4] = LABELS + 0.1 * codes[:, 4]
    else:
        x[:, 0] += 6 * LABELS
    rows = Rows.of(x, SparseRows.from_dense(codes))
    half = torch.arange(200) < 120
    at = (half.nonzero()[:, 0], (~half).nonzero()[:, 0])
    return Task("t", rows.at(at[0]), LABELS[half], rows.at(at[1]), LABELS[~half])


def test_a_quiver_gains_where_only_a_latent_tells_and_nowhere_else():
    baselines, sparse = (Logistic(), Components()), (SparseProbe(2, "l2"),)
    found = shoot(task(True), "scarcity", 24, baselines, sparse)
    assert found.gain > 0.2
    assert found.pick(sparse=True) == "2 latents"
    assert shoot(task(False), "scarcity", 24, baselines, sparse).gain == 0


def test_test_rows_have_no_say():
    """Other test labels change what is reported, not what is picked."""
    one = task(True)
    other = Task("t", one.pool, one.labels, one.test, ~one.test_labels)
    probes = (Logistic(), Components()), (SparseProbe(2, "l2"),)
    a, b = (shoot(t, "noise", 0.2, *probes, size=40) for t in (one, other))
    assert a.validation == b.validation
    assert a.test["2 latents"] == pytest.approx(1 - b.test["2 latents"])


def test_shift_needs_shifted_rows():
    with pytest.raises(GossamerError, match="shifted"):
        shoot(task(True), "shift", 0, (Logistic(),), ())
