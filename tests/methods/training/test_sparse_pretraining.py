"""Sparse pre-training: the window is one of operations, of the model that is trained."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer import methods
from gossamer.core import GossamerError
from gossamer.methods.training.sparse_pretraining import SparsePretraining
from gossamer.methods.training.sparsifier.checkpoint import read_state, write_state
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def run(model, optimizer, sparsifier, steps, watch=None):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 16, generator=generator)
        y = torch.randint(0, 4, (8,), generator=generator)
        cross_entropy(model(x), y).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
        if watch is not None:
            watch(sparsifier)


@pytest.mark.parametrize("skip", ["", "2"])
@pytest.mark.parametrize("curve", ["cubic", "linear"])
def test_the_window_is_one_of_the_operations_counted(curve, skip):
    model = net()
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SparsePretraining(sparsity=0.9, steps=200, every=1, curve=curve, skip=skip)
    sparsifier = method.attach(model, trains)
    seen = []
    run(
        model,
        trains,
        sparsifier,
        range(200),
        lambda s: seen.append((s.flops.total, s.sparsity)),
    )
    total = seen[-1][0]
    dense = [spent / total for spent, sparsity in seen if sparsity == 0.0]
    last = sparsifier.method.prunings[-1][0]
    step = 3 / 200
    assert max(dense) == pytest.approx(0.25, abs=step)
    assert seen[last - 1][0] / total == pytest.approx(0.75, abs=step)
    assert seen[last - 2][1] < seen[last - 1][1] == seen[-1][1] or curve == "cubic"
    # By updates the first quarter of the operations is over much earlier.
    assert len(dense) < 0.2 * 200
    middle = next(sparsity for spent, sparsity in seen if spent / total >= 0.5)
    assert middle == pytest.approx(0.9 * (0.875 if curve == "cubic" else 0.5), abs=0.03)
    assert sparsifier.method.fixed == pytest.approx(96 / (384 + 96) if skip else 0.0)


def test_the_head_of_a_language_model_makes_the_dense_stretch_shorter():
    model = tiny_model("llama")
    trains = torch.optim.AdamW(model.parameters(), lr=1e-3)
    method = SparsePretraining(sparsity=0.5, steps=100)
    sparsifier = method.attach(model, trains)
    head = model.lm_head.weight.numel()
    size = sum(layer.size for layer in sparsifier.layers)
    assert sparsifier.method.fixed == pytest.approx(head / (head + size))
    assert sparsifier.method.share > method.share
    sparsifier.remove()


@pytest.mark.parametrize("at", [7, 20, 33])
def test_resuming_through_a_file_is_bit_exact(at, tmp_path):
    method = SparsePretraining(sparsity=0.8, steps=40, every=3, skip="2")
    straight = net()
    trains = torch.optim.AdamW(straight.parameters(), lr=1e-2)
    whole = method.attach(straight, trains)
    run(straight, trains, whole, range(40))

    first = net()
    before = torch.optim.AdamW(first.parameters(), lr=1e-2)
    half = method.attach(first, before)
    run(first, before, half, range(at))
    weights, moments = copy.deepcopy((first.state_dict(), before.state_dict()))
    write_state(half.state_dict(), tmp_path / "state")

    again = net(1)
    after = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(weights)
    after.load_state_dict(moments)
    rest = method.attach(again, after, state=read_state(tmp_path / "state"))
    run(again, after, rest, range(at, 40))
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.flops.to_dict() == rest.flops.to_dict()


def test_another_windows_state_is_refused():
    model = net()
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    first = SparsePretraining(sparsity=0.5, steps=9).attach(model, trains)
    state = first.state_dict()
    first.remove()
    other = SparsePretraining(sparsity=0.5, steps=9, window=(0.5, 0.75))
    with pytest.raises(GossamerError, match="another training \\(window"):
        other.attach(model, trains, state=state)


def test_a_window_at_one_point_prunes_once():
    method = SparsePretraining(sparsity=0.5, steps=90, window=(0.5, 0.5), fixed=0.0)
    ((when, sparsity),) = method.prunings
    assert (when, sparsity) == (30, 0.5)
    assert method.sparsity_at(29) == 0.0
    assert method.sparsity_at(30) == 0.5
    assert method.change(30).sparsity == 0.5
    assert method.change(29) is method.change(31) is None


def test_equal_compute_from_the_share():
    for window in ((0.0, 0.25), (0.25, 0.75), (0.75, 1.0)):
        method = SparsePretraining(sparsity=0.5, steps=2000, window=window, every=5)
        longer = method.lasting(round(2000 / method.share))
        assert longer.steps * longer.share == pytest.approx(2000, abs=4)


def test_a_window_in_text_and_in_json():
    method = methods.make("sparse_pretraining", window="0.1-0.5")
    assert method.window == (0.1, 0.5)
    assert SparsePretraining.from_dict(json.loads(json.dumps(method.to_dict()))) == method


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": (0.75, 0.25)}, "ends at 0.25 of the operations and starts at 0.75"),
        ({"window": (0.5, 1.5)}, "0 <= start <= end <= 1"),
        ({"window": "a quarter"}, "two shares"),
        ({"window": (0.1, 0.2, 0.3)}, "two shares"),
        ({"curve": "cosine"}, "curve"),
        ({"every": 0}, "every"),
        ({"fixed": 1.5}, "fixed"),
        ({"pattern": "2:4"}, "takes no pattern"),
    ],
)
def test_bad_values_are_refused_in_one_line(values, message):
    with pytest.raises(GossamerError, match=message) as error:
        SparsePretraining(**values)
    assert "\n" not in str(error.value)


def test_the_report_says_when_weights_went():
    model = tiny_model("llama")
    method = SparsePretraining(sparsity=0.5, steps=20, every=2, batch_size=2)
    with method.apply(model, random_tokens()) as applied:
        text = str(applied.report())
        assert "pruned after updates" in text
        assert "at work on average" in text
