"""Reprogramming: it learns another task, touches nothing, and is saved and taken up again."""

import json

import pytest
import torch
from torch import nn

from gossamer import Reprogramming, load
from gossamer.core import GossamerError
from gossamer.methods.training.reprogrammed import training
from gossamer.methods.training.reprogrammed.training import AdapterPlan
from gossamer.models import Inputs, at_work
from gossamer.models.labelled import Labelled
from tests.models.subjects import SUBJECTS
from tests.models.tiny import tiny_folder, tiny_model, tiny_tokenizer


def bars(count=60, side=6, seed=0):
    """Images that are bright in one of three places, and where."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = 0.3 * torch.rand(count, 1, side, side, generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, :, 2 * label : 2 * label + 2] += 0.7
    return images, labels


def columns(count=60):
    """The same turned by a quarter: a task that a network of rows does not know."""
    images, labels = bars(count, seed=1)
    return images.transpose(2, 3).contiguous(), labels


def network():
    """Trained to tell the rows; its fourth class never occurs."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 4)
    )
    images, labels = bars()
    images = nn.functional.pad(images, [1] * 4, value=0.5)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net


LEARN = {"canvas": 8, "width": 1, "epochs": 40, "lr": 0.1}


def accuracy(net, data):
    with torch.no_grad():
        return float((net(data[0]).argmax(1) == data[1]).double().mean())


def merged():
    """The first row against the two others: what a prompt can tell a network of rows."""
    images, labels = bars(seed=2)
    return images, labels.clamp_max(1)


# Under an untrained frame 0.73 of the merged rows are told apart.
@pytest.mark.parametrize(
    ("adapter", "task", "least"), [("prompt", merged, 0.78), ("probe", columns, 0.9)]
)
def test_a_frozen_network_learns_another_task(adapter, task, least):
    net, data = network(), task()
    net.train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    wanted = [p.requires_grad for p in net.parameters()]
    work = Reprogramming(adapter=adapter, **LEARN, batch_size=20).apply(net, data)
    assert net.training
    assert wanted == [p.requires_grad for p in net.parameters()]
    assert all(p.grad is None for p in net.parameters())
    net.eval()
    assert work.losses[-1] < 0.6 * work.losses[0]
    assert accuracy(net, data) > least
    found = work.quality(data)
    assert found["accuracy"] == pytest.approx(accuracy(net, data))
    assert 0 <= found["ece"] <= 1
    assert torch.allclose(work.predict(data).sum(1), torch.ones(60))
    work.restore()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_the_map_follows_the_network():
    """A network whose classes are the task's in another order needs no training at all."""
    net, (images, labels) = network().eval(), bars()
    renamed = torch.tensor([2, 0, 1])[labels]
    work = Reprogramming(canvas=8, width=1, epochs=1, lr=1e-9).apply(net, (images, renamed))
    assert accuracy(net, (images, renamed)) > 0.9
    mapped = work.label_map
    assert mapped == {"0": 1, "1": 2, "2": 0}
    assert "label map: 0 is class 1, 1 is class 2, 2 is class 0" in work.report().notes
    work.restore()
    with Reprogramming(canvas=8, width=1, epochs=1, lr=1e-9, remap_every=0).apply(
        net, (images, renamed)
    ) as plain:
        assert plain.label_map == {"0": 0, "1": 1, "2": 2}
        assert accuracy(net, (images, renamed)) < 0.3


def test_the_map_is_found_anew_as_epochs_begin(monkeypatch):
    net, data = network().eval(), columns()
    calls = []
    monkeypatch.setattr(training, "remap", lambda *_: calls.append(len(calls)))
    for every, want in ((1, 6), (2, 3), (4, 2), (0, 0)):
        calls.clear()
        with Reprogramming(**{**LEARN, "epochs": 6}, remap_every=every).apply(net, data):
            assert len(calls) == want


def test_rates_fall_at_half_and_at_72_percent():
    plan = AdapterPlan(epochs=100, lr=0.01, batch_size=8, remap_every=1, seed=0)
    rates = [plan.rate(epoch) for epoch in (0, 49, 50, 71, 72, 99)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


def test_report_says_what_is_frozen_and_what_was_learned():
    net = network()
    with torch.no_grad():
        net[1].weight.mul_(torch.arange(24)[:, None] % 2 == 0)
    with Reprogramming(**{**LEARN, "epochs": 1}, shots=5).apply(net, columns()) as work:
        report = work.report()
    rows = {row.name: row.sparsity for row in report.rows}
    assert rows == {"1": 0.5, "4": 0.0}
    assert report.notes[0].startswith("image prompt of 28 learned values; all 1,660 of")
    assert "15 of 60 samples in 3 classes" in report.notes[1]


def test_an_interrupt_leaves_no_trace():
    net = network()
    hooks = len(net._forward_hooks)

    def stop(done, total, what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reprogramming(**LEARN).apply(net, columns(), progress=stop)
    assert len(net._forward_hooks) == hooks == 0
    assert not net._forward_pre_hooks
    assert all(p.requires_grad for p in net.parameters())
    assert not at_work(net)


@pytest.mark.parametrize("adapter", ["prompt", "probe"])
def test_stored_and_taken_up_again(adapter):
    net, data = network().eval(), columns()
    method = Reprogramming(adapter=adapter, **{**LEARN, "epochs": 2})
    with method.apply(net, data) as work:
        expected, state = net(data[0]), work.state()
        report = work.report()
    meta = json.loads(json.dumps(state.meta))
    with method.reattach(net, meta, state.tensors) as again:
        assert torch.equal(net(data[0]), expected)
        assert again.report() == report
        assert again.label_map == work.label_map


def labelled_text():
    """Windows of two kinds, told by one word near the end."""
    ids = torch.randint(50, 128, (24, 7), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 2
    ids[:, 5] = 10 + 7 * labels
    return Labelled.from_ids(ids, label=labels)


@pytest.mark.parametrize("adapter", ["prompt", "probe"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_language_model_becomes_a_classifier_and_is_saved_as_it_was(name, adapter, tmp_path):
    folder = tiny_folder(tmp_path / "model", name)
    model, data = load(folder).model, labelled_text()
    ids = data.tokens.input_ids
    with torch.no_grad():
        dense = model(input_ids=ids).logits
    method = Reprogramming(adapter=adapter, epochs=30, lr=0.2, width=3)
    work = method.apply(model, data)
    assert work.losses[-1] < 0.8 * work.losses[0]
    assert work.quality(data)["accuracy"] > 0.7
    with torch.no_grad():
        found = model(input_ids=ids).logits
    assert found.shape == (24, 2)
    work.save(tmp_path / "saved", tiny_tokenizer())
    work.restore()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, dense)
    again = load(tmp_path / "saved").model
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, found, atol=1e-6)
    at_work(again)[0].restore()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, dense)


class TestBadInput:
    def test_parameters(self):
        for values, what in (
            ({"adapter": "lora"}, "unknown adapter"),
            ({"lr": 0}, "lr is 0"),
            ({"epochs": 0}, "epochs"),
            ({"width": 0}, "width"),
            ({"shots": 0}, "shots"),
            ({"remap_every": -1}, "remap_every"),
        ):
            with pytest.raises(GossamerError, match=what):
                Reprogramming(**values)

    def test_more_classes_than_the_network_has(self):
        images, labels = columns()
        labels = torch.arange(60) % 6
        with pytest.raises(GossamerError, match="the task has 6 classes, the frozen network 4"):
            Reprogramming(**LEARN).apply(network(), (images, labels))
        with Reprogramming(adapter="probe", **LEARN).apply(network(), (images, labels)) as work:
            assert work.label_map is None

    def test_twice(self):
        net, data = network(), columns()
        method = Reprogramming(**{**LEARN, "epochs": 1})
        with method.apply(net, data), pytest.raises(GossamerError, match="reprogrammed already"):
            method.apply(net, data)

    def test_an_unknown_canvas(self):
        with pytest.raises(GossamerError, match="give canvas"):
            Reprogramming().apply(network(), (torch.rand(6, 1, 4, 8), torch.arange(6) % 3))

    def test_a_text_too_long_for_its_prompt(self):
        ids = torch.randint(3, 128, (4, 127))
        data = Labelled.from_ids(ids, label=torch.arange(4) % 2)
        with pytest.raises(GossamerError, match="127 tokens behind 2 learned vectors exceed"):
            Reprogramming(width=2).apply(tiny_model("llama"), data)

    def test_a_label_beyond_the_task(self):
        net, (images, labels) = network(), columns()
        work = Reprogramming(**{**LEARN, "epochs": 1}).apply(net, (images, labels))
        with work, pytest.raises(GossamerError, match="labels go to 3, the task has 3"):
            work.quality((images[:4], torch.arange(4)))

    def test_unlabelled_images(self):
        subject = SUBJECTS["vision model"]
        pixels = subject.data().values["pixel_values"]
        with pytest.raises(GossamerError, match="no labels"):
            Reprogramming().apply(subject.build(), Inputs({"pixel_values": pixels}))

    def test_another_network(self):
        method = Reprogramming(**{**LEARN, "epochs": 1})
        with method.apply(network(), columns()) as work:
            state = work.state()
        with pytest.raises(GossamerError, match="head 4, which is not here"):
            method.reattach(
                nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), state.meta, state.tensors
            )


@pytest.mark.parametrize("adapter", ["prompt", "probe"])
def test_one_class_is_no_task(adapter):
    images, labels = columns()
    with pytest.raises(GossamerError, match="all 60 samples have the label '0'; .* two classes"):
        Reprogramming(**LEARN, adapter=adapter).apply(network(), (images, 0 * labels))


def test_a_canvas_the_network_does_not_take():
    with pytest.raises(GossamerError, match=r"Sequential failed on the first batch, x \(1, 1, 9"):
        Reprogramming(**{**LEARN, "canvas": 9}).apply(network(), columns())
