"""Concrete Ticket Search at work: exact masks, unlabelled data, resuming, undoing, bad input."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer.core import GossamerError
from gossamer.methods.training.at_start.sanity import CHECKS, sanity_checks
from gossamer.methods.training.concrete_ticket import ConcreteTicket
from gossamer.methods.training.snip import SNIP
from gossamer.methods.training.sparsifier.layers import find_layers
from gossamer.methods.training.tickets.looking import SearchData
from gossamer.methods.training.tickets.objectives import OBJECTIVES
from gossamer.models import Inputs, Tokens
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)
    )


def pairs(count=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator))
        for _ in range(count)
    ]


def attach(model, method=None, **values):
    method = method or ConcreteTicket(sparsity=0.75, steps=8)
    trains = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return method.attach(model, trains, **{"data": pairs(), **values})


def run(model, sparsifier, steps):
    for step in steps:
        x, y = pairs()[step % 4]
        cross_entropy(model(x), y).backward()
        sparsifier.optimizer.step()
        sparsifier.step()
        sparsifier.optimizer.zero_grad()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_leaves_exactly_the_budget(objective):
    model = net()
    before = copy.deepcopy(model.state_dict())
    sparsifier = attach(model, ConcreteTicket(sparsity=0.75, steps=8, objective=objective))
    assert sum(sparsifier.kept().values()) == 48
    for name, value in before.items():
        mask = sparsifier.held[name].mask if name in sparsifier.held else 1
        assert torch.equal(model.state_dict()[name], value * mask), name
    assert model.training
    assert model[0].weight.grad is None
    run(model, sparsifier, range(8))
    report = sparsifier.finish().report()
    assert report.sparsity == 0.75
    assert any(f"search by {objective}: 4 steps" in note for note in report.notes)
    # Logits and two moments of 192 weights at four bytes.
    assert any("held 2,304 bytes" in note for note in report.notes)


def test_the_ticket_is_the_largest_logits():
    model, method = net(), ConcreteTicket(sparsity=0.9, steps=20, search=1.0)
    layers = find_layers(model)
    scores = method.start_scores(model, layers, SearchData(pairs()))
    flat = torch.cat([scores[layer.name].flatten() for layer in layers])
    wanted = torch.zeros(192, dtype=torch.bool)
    wanted[flat.topk(19).indices] = True
    sparsifier = attach(model, method)
    masks = torch.cat([sparsifier.mask(layer.name).flatten() for layer in layers])
    assert torch.equal(masks, wanted)


def test_the_cost_of_the_search_is_counted():
    model = net()
    sparsifier = attach(model)
    # Four steps of two forward passes and a backward pass, of 192 weights.
    assert sparsifier.flops.total == 4 * 4 * 2 * 192
    run(model, sparsifier, range(8))
    assert sparsifier.flops.total == 4 * 4 * 2 * 192 + 8 * 6 * 48
    notes = " ".join(sparsifier.finish().report().notes)
    assert f"{(6144 + 2304) / (8 * 6 * 192):.2f} times the operations of a dense" in notes


def test_labels_are_not_read_by_what_needs_none():
    masks = []
    for batches in (pairs(), [x for x, _ in pairs()], [(x, y.flip(0)) for x, y in pairs()]):
        sparsifier = attach(net(), data=batches)
        masks.append({path: one.mask for path, one in sparsifier.held.items()})
    for other in masks[1:]:
        assert all(torch.equal(mask, other[path]) for path, mask in masks[0].items())
    with pytest.raises(GossamerError, match="no labels; use objective kl or features"):
        attach(net(), ConcreteTicket(steps=8, objective="task"), data=[x for x, _ in pairs()])


def test_random_state_and_modes_are_left_alone():
    model = net()
    model[3].eval()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    attach(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert not model[3].training


def test_resuming_does_not_search_again():
    straight = net()
    straight[3].p = 0.0
    whole = attach(straight)
    run(straight, whole, range(8))
    first = net()
    first[3].p = 0.0
    half = attach(first)
    run(first, half, range(3))
    saved = copy.deepcopy((first.state_dict(), half.optimizer.state_dict(), half.state_dict()))
    again = net(seed=1)
    again[3].p = 0.0
    trains = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    again.load_state_dict(saved[0])
    trains.load_state_dict(saved[1])
    rest = half.method.attach(again, trains, state=saved[2])
    run(again, rest, range(3, 8))
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rest.flops.to_dict() == whole.flops.to_dict()


def test_sanity_checks_take_it():
    method = ConcreteTicket(sparsity=0.75, steps=4)

    def train(model, attaches):
        sparsifier = attaches(model, torch.optim.SGD(model.parameters(), lr=0.1))
        run(model, sparsifier, range(4))
        return float(sum(sparsifier.kept().values()))

    found = sanity_checks(method, net, train, loss=SearchData(pairs()))
    assert found == dict.fromkeys(CHECKS, 48.0)
    plain, inverse = (
        attach(net(), ConcreteTicket(sparsity=0.5, steps=40, invert=invert)).mask("0")
        for invert in (False, True)
    )
    assert (plain & inverse).sum() < 20


def test_other_methods_before_training_take_the_same_data():
    model = net()
    trains = torch.optim.SGD(model.parameters(), lr=0.1)
    assert SNIP(sparsity=0.75, steps=2).attach(model, trains, loss=SearchData(pairs())).sparsity


class TestApply:
    def test_the_search_sees_the_first_batches_of_the_training(self):
        """So the same search on them by hand finds the same masks."""
        from gossamer.models.fit import batches

        method = ConcreteTicket(sparsity=0.5, steps=4, batch_size=3, seed=3)
        data = random_tokens()
        model = tiny_model("llama")
        seen = []
        work = method.apply(model, data, progress=lambda *a: seen.append(a))
        assert [a[:2] for a in seen] == [(1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (4, 4)]
        assert seen[0][2] == "search by kl"
        by_hand = tiny_model("llama")
        trains = torch.optim.AdamW(by_hand.parameters())
        looked = list(batches(data, method.plan()))
        sparsifier = method.attach(by_hand, trains, data=looked)
        for layer in sparsifier.layers:
            assert torch.equal(sparsifier.mask(layer.name), work.selection(layer.name).mask())

    def test_dense_updates_before_the_search(self):
        method = ConcreteTicket(sparsity=0.5, steps=4, batch_size=3, rewind=0.5)
        model = tiny_model("llama")
        work = method.apply(model, random_tokens())
        dense = ConcreteTicket(sparsity=0.0, steps=4, batch_size=3).apply(
            tiny_model("llama"), random_tokens()
        )
        assert work.losses[:2] == dense.losses[:2]
        assert work.losses[2] != dense.losses[2]
        assert not any("training ended" in text for text in work.report().warnings)
        size = sum(work.flops.sizes.values()) + work.flops.others
        kept = size - 0.5 * sum(work.flops.sizes.values())
        assert work.flops.total == pytest.approx(2 * 4 * 2 * size + 2 * 6 * size + 2 * 6 * kept)

    def test_unlabelled_search_data(self):
        found = []
        generator = torch.Generator().manual_seed(4)
        other = Tokens.from_ids(torch.randint(1, 90, (6, 12), generator=generator))
        unlabelled = Inputs({"input_ids": other.input_ids})
        for search_data in (None, other, unlabelled):
            method = ConcreteTicket(sparsity=0.5, steps=2, batch_size=3)
            with method.apply(
                tiny_model("llama"), random_tokens(), search_data=search_data
            ) as work:
                found.append({layer.name: work.masks[layer.name] for layer in work.layers})
        assert any(not torch.equal(bits, found[1][name]) for name, bits in found[0].items())
        assert all(torch.equal(bits, found[2][name]) for name, bits in found[1].items())

    def test_an_interrupt_leaves_no_trace(self):
        for stop in ("search", "concrete"):
            model = tiny_model("llama")

            def interrupts(done, whole, what, stop=stop):
                if what.startswith(stop) and done == 2:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                ConcreteTicket(steps=4, batch_size=3).apply(
                    model, random_tokens(), progress=interrupts
                )
            fresh = tiny_model("llama")
            for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
                assert torch.equal(a, b)
                assert isinstance(a, nn.Parameter)
                assert a.requires_grad
                assert not a._backward_hooks, name


class TestBadInput:
    @pytest.mark.parametrize("search", [0, 0.0, -0.5, 1.5, math.nan, "half"])
    def test_searches_of_no_length_or_too_long(self, search):
        with pytest.raises(GossamerError, match="search is .*0 < search <= 1"):
            ConcreteTicket(search=search)

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"objective": "kld"}, "unknown objective 'kld'; did you mean kl"),
            ({"balance": "lagrangian"}, "unknown balance 'lagrangian'; did you mean lagrange"),
            ({"search_lr": 0}, "search_lr is 0; give a number above 0"),
            ({"rewind": 1.0}, "rewind is 1.0; it is a share"),
            ({"rewind": 0.99, "steps": 10}, "searches after update 10 of 10"),
        ],
    )
    def test_what_is_said(self, values, said):
        with pytest.raises(GossamerError, match=said):
            ConcreteTicket(**values)

    def test_no_batches(self):
        with pytest.raises(GossamerError, match="attach with data=, a list or a loader"):
            attach(net(), data=None)
        with pytest.raises(GossamerError, match="ended after 2 batches"):
            attach(net(), data=iter(pairs(2)))

    def test_a_sparsity_that_empties_a_layer_is_floored_and_said(self):
        model = net()
        with torch.no_grad():
            model[0].weight.zero_()
        sparsifier = attach(model, ConcreteTicket(sparsity=0.99, steps=60, search=1.0))
        assert sum(sparsifier.kept().values()) == 2
        assert min(sparsifier.kept().values()) == 1
        assert any("would be emptied" in text for text in sparsifier.warnings)

    def test_nothing_to_remove_needs_no_search(self):
        sparsifier = attach(net(), ConcreteTicket(sparsity=0.0, steps=2), data=None)
        assert sparsifier.sparsity == 0.0
        assert not any("search" in n for n in sparsifier.finish().report().notes)
