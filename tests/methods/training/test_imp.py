"""IMP: rounds, rewinding to the bit, resuming, own loops, bad input."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer.core import GossamerError, unpack_bits
from gossamer.methods.training.imp import IMP
from gossamer.methods.training.tickets.rounds import find_ticket
from gossamer.models import at_work
from tests.methods.training.tickets.loops import STEPS, Loop, batch, net
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


def test_rounds_prune_the_smallest_survivors_of_all_layers():
    method = IMP(sparsity=0.6, prune=0.25, steps=STEPS, rewind=0.2)
    assert method.rounds == 4
    loop = Loop(method)
    work = find_ticket(method, net(), loop)
    kept = [sum(int(m.sum()) for m in masks.values()) for masks in loop.masks]
    # 192 weights: 0.75^r of them, and 40 % after the last round.
    assert kept == [192, 144, 108, 81, 77]
    assert [round(r["sparsity"], 6) for r in work.rounds] == [round(1 - k / 192, 6) for k in kept]
    for before, after, end in zip(loop.masks, loop.masks[1:], loop.ends, strict=False):
        size = torch.cat([end[path].abs()[before[path]] for path in before])
        stays = torch.cat([after[path][before[path]] for path in before])
        assert all(not (after[path] & ~before[path]).any() for path in before)
        assert size[stays].min() >= size[~stays].max()
    assert work.report().sparsity == pytest.approx(1 - 77 / 192)


@pytest.mark.parametrize("rewind", [0.0, 0.3])
@pytest.mark.parametrize(
    "optimizer",
    [None, lambda p: torch.optim.Adam(p, lr=1e-2)],
    ids=["sgd", "adam"],
)
def test_every_round_begins_where_the_first_one_was(rewind, optimizer):
    method = IMP(sparsity=0.5, prune=0.2, steps=STEPS, rewind=rewind)
    model = net()
    start = copy.deepcopy(model.state_dict())
    loop = Loop(method, optimizer=optimizer)
    find_ticket(method, model, loop)
    k = method.rewind_step
    # The same training, cut off at update k, by hand.
    alone = net()
    assert all(torch.equal(v, start[name]) for name, v in alone.state_dict().items())
    torch.manual_seed(7)
    trains = loop.make(alone.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(trains, 3, 0.5)
    for step in range(k):
        x, y = batch(step)
        cross_entropy(alone(x), y).backward()
        trains.step()
        schedule.step()
        trains.zero_grad()
    assert len(loop.begins) == method.rounds + 1 == 5
    for number, (weights, optimizer_state) in enumerate(loop.begins[1:], 1):
        masks = loop.masks[number]
        for name, value in alone.state_dict().items():
            expected = value * masks[name] if name in masks else value
            assert torch.equal(weights[name], expected), (number, name)
        assert optimizer_state["param_groups"] == trains.state_dict()["param_groups"]
        names = [name for name, _ in alone.named_parameters()]
        for index, state in trains.state_dict()["state"].items():
            for key, value in state.items():
                found = optimizer_state["state"][index][key]
                if torch.is_tensor(value) and value.dim() and names[index] in masks:
                    value = value * masks[names[index]]
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(value))
        assert loop.rates[number] == loop.rates[0][k:]


def test_a_round_that_prunes_nothing_repeats_the_training_to_the_bit():
    """Weights, momentum, statistics, dropout, rates and batches are those after update k."""
    method = IMP(sparsity=1e-9, prune=0.5, steps=STEPS, rewind=0.4)
    assert method.rounds == 1
    loop = Loop(method)
    find_ticket(method, net(), loop)
    first, second = loop.ends
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_apply_repeats_itself_to_the_bit_as_well():
    seen = []
    model = tiny_model("llama")
    method = IMP(sparsity=1e-9, prune=0.5, steps=5, rewind=0.4, batch_size=2)

    def progress(done, whole, what):
        seen.append((done, whole, what.split(",")[0]))

    with method.apply(model, random_tokens(), progress=progress) as work:
        assert work.losses[:5][2:] == work.losses[5:]
    assert [s[0] for s in seen] == list(range(1, 9))
    assert {s[1] for s in seen} == {8}
    assert seen[0][2] == "imp round 0 of 1"
    assert seen[-1][2] == "imp round 1 of 1"


def test_operations_of_all_rounds_are_counted():
    method = IMP(sparsity=0.5, prune=0.5, steps=STEPS, rewind=0.2)
    work = find_ticket(method, net(), Loop(method))
    # 10 dense updates of 192 weights and 8 of 96, six operations a weight.
    assert work.flops.total == 6 * (10 * 192 + 8 * 96)
    assert any("2 trainings" in note and "1.40 times" in note for note in work.report().notes)


def test_a_ticket_trains_again_and_restores(tmp_path):
    method = IMP(sparsity=0.5, prune=0.5, steps=STEPS, rewind=0.2)
    model = net()
    start = copy.deepcopy(model.state_dict())
    loop = Loop(method)
    work = find_ticket(method, model, loop)
    end = copy.deepcopy(model.state_dict())
    other = net(seed=3)
    trains = loop.make(other.parameters())
    again = method.attach(
        other,
        trains,
        state=work.ticket,
        scheduler=torch.optim.lr_scheduler.StepLR(trains, 3, 0.5),
    )
    assert again.updates == 2
    assert again.sparsity == 0.5
    assert torch.equal(other[0].weight, loop.begins[1][0]["0.weight"])
    assert any("the point to rewind to" in note for note in again.finish().report().notes)
    assert all(torch.equal(v, end[k]) for k, v in model.state_dict().items())
    work.restore()
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    assert not at_work(model)


def test_masters_are_rewound_with_the_weights():
    method = IMP(sparsity=0.5, prune=0.5, steps=6, rewind=0.5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()
    names = dict(model.named_parameters())
    begins = []

    def train(_, attach):
        masters = {name: nn.Parameter(p.detach().float()) for name, p in names.items()}
        if begins:
            masters = begins[0][1]
        trains = torch.optim.SGD(masters.values(), lr=0.1, momentum=0.9)
        sparsifier = attach(model, trains, masters=masters)
        begins.append(({k: v.detach().clone() for k, v in masters.items()}, masters))
        for step in range(attach.start, method.steps):
            x, y = batch(step)
            cross_entropy(model(x.bfloat16()).float(), y).backward()
            for name, p in names.items():
                masters[name].grad = p.grad.float()
            trains.step()
            with torch.no_grad():
                for name, p in names.items():
                    p.copy_(masters[name])
                    p.grad = None
            sparsifier.step()
            if attach.round == 0 and sparsifier.updates == 3:
                begins.append(({k: v.detach().clone() for k, v in masters.items()}, masters))

    find_ticket(method, model, train)
    point, second = begins[1][0], begins[2][0]
    for name, value in second.items():
        kept = value != 0
        assert torch.equal(value[kept], point[name][kept])
    assert sum(int((v == 0).sum()) for n, v in second.items() if "weight" in n) == 96


class TestBadInput:
    @pytest.mark.parametrize("rewind", [1.0, 1.5, 0.999])
    def test_rewinding_beyond_the_training(self, rewind):
        with pytest.raises(GossamerError, match="goes back to update .* of 100, which leaves"):
            IMP(steps=100, rewind=rewind)

    @pytest.mark.parametrize("rewind", [-0.1, math.nan, "early"])
    def test_rewinding_to_nowhere(self, rewind):
        with pytest.raises(GossamerError, match="rewind"):
            IMP(rewind=rewind)

    @pytest.mark.parametrize("prune", [0.0, 1.0, -1, math.nan, None])
    def test_rounds_that_prune_nothing_or_all(self, prune):
        with pytest.raises(GossamerError, match="prune"):
            IMP(prune=prune)

    def test_a_sparsity_that_empties_a_layer_is_floored_and_said(self):
        method = IMP(sparsity=0.985, prune=0.9, steps=3, rewind=0.0)
        model = net()
        with torch.no_grad():
            model[4].weight.mul_(1e-9)

        def train(_, attach):
            sparsifier = attach(model, torch.optim.SGD(model.parameters(), lr=1e-12))
            for step in range(attach.start, 3):
                x, y = batch(step)
                cross_entropy(model(x), y).backward()
                sparsifier.optimizer.step()
                sparsifier.step()

        work = find_ticket(method, model, train)
        assert {layer.name: int(work.selection(layer.name).kept) for layer in work.layers} == {
            "0": 2,
            "4": 1,
        }
        assert any("4 would be emptied" in text for text in work.report().warnings)

    def test_by_hand(self):
        method = IMP(sparsity=0.5, prune=0.5, steps=2)
        model = net()
        sparsifier = method.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(GossamerError, match="trained for 0 of 2 updates"):
            sparsifier.next_round()
        warnings = sparsifier.finish().report().warnings
        assert any("ended after round 0 of 1" in text for text in warnings)


def test_the_ticket_is_what_was_trained():
    method = IMP(sparsity=0.5, prune=0.5, steps=STEPS, rewind=0.2)
    loop = Loop(method)
    work = find_ticket(method, net(), loop)
    for path, bits in work.ticket["masks"].items():
        assert torch.equal(unpack_bits(bits, loop.masks[1][path].shape), loop.masks[1][path])
