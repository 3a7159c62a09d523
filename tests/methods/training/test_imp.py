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
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

STEPS = 10


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(8, 8, generator=generator),
        torch.randint(0, 4, (8,), generator=generator),
    )


class Loop:
    """A loop with momentum, dropout and a scheduler, that remembers what it saw."""

    def __init__(self, method, stop=None, optimizer=None):
        self.method, self.stop = method, stop
        self.begins, self.masks, self.rates, self.ends = [], [], [], []
        self.make = optimizer or (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3)
        )

    def __call__(self, model, attach):
        if attach.round == self.stop:
            raise KeyboardInterrupt
        torch.manual_seed(7)
        trains = self.make(model.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(trains, 3, 0.5)
        sparsifier = attach(model, trains, scheduler=schedule)
        assert sparsifier.updates == attach.start
        self.begins.append(copy.deepcopy((model.state_dict(), trains.state_dict())))
        rates = []
        for step in range(attach.start, self.method.steps):
            rates.append(trains.param_groups[0]["lr"])
            x, y = batch(step)
            loss = cross_entropy(model(x), y)
            loss.backward()
            trains.step()
            sparsifier.step()
            schedule.step()
            trains.zero_grad()
            for one in sparsifier.held.values():
                for tensor in one.tensors(trains):
                    assert not tensor.detach()[~one.mask].any()
        self.rates.append(rates)
        self.masks.append({path: one.mask.clone() for path, one in sparsifier.held.items()})
        self.ends.append(copy.deepcopy(model.state_dict()))
        return float(loss.detach())


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


class TestResuming:
    def test_a_killed_search_goes_on_with_the_round(self, tmp_path):
        method = IMP(sparsity=0.6, prune=0.25, steps=STEPS, rewind=0.2)
        whole = net()
        straight = find_ticket(method, whole, Loop(method))

        model = net()
        start = copy.deepcopy(model.state_dict())
        with pytest.raises(KeyboardInterrupt):
            find_ticket(method, model, Loop(method, stop=3), folder=tmp_path)
        assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
        assert not model[0].weight._backward_hooks
        assert [p.name for p in tmp_path.iterdir()] == ["gossamer_rounds.safetensors"]

        again = net(seed=5)
        rest = Loop(method)
        work = find_ticket(method, again, rest, folder=tmp_path)
        assert len(rest.begins) == 2
        for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert work.rounds == straight.rounds
        assert work.flops.to_dict() == straight.flops.to_dict()
        assert work.report().warnings == straight.report().warnings

    def test_apply_resumes(self, tmp_path):
        method = IMP(sparsity=0.75, prune=0.5, steps=4, rewind=0.25, batch_size=2)
        whole = tiny_model("llama")
        method.apply(whole, random_tokens())

        def interrupts(done, total, what):
            if "round 2" in what:
                raise KeyboardInterrupt

        model = tiny_model("llama")
        with pytest.raises(KeyboardInterrupt):
            method.apply(model, random_tokens(), progress=interrupts, folder=tmp_path)
        fresh = tiny_model("llama")
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
        )
        done = []
        work = method.apply(
            model, random_tokens(), folder=tmp_path, progress=lambda *a: done.append(a[0])
        )
        assert done == [8, 9, 10]
        for a, b in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a, b)
        assert len(work.rounds) == 3

    def test_in_the_middle_of_a_round(self):
        method = IMP(sparsity=0.5, prune=0.5, steps=STEPS, rewind=0.2)
        ends = []
        for cut in (None, 1, 2, 6):
            model = net()
            model[3].p = 0.0
            state = None
            for _ in range(2):
                trains = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                sparsifier = method.attach(model, trains, state=state)
                for step in range(sparsifier.updates, STEPS):
                    x, y = batch(step)
                    cross_entropy(model(x), y).backward()
                    trains.step()
                    sparsifier.step()
                    trains.zero_grad()
                    if sparsifier.updates == cut:
                        kept = copy.deepcopy((model.state_dict(), trains.state_dict()))
                        middle = copy.deepcopy(sparsifier.state_dict())
                        sparsifier.remove()
                        model = net(seed=9)
                        model[3].p = 0.0
                        trains = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                        model.load_state_dict(kept[0])
                        trains.load_state_dict(kept[1])
                        sparsifier = method.attach(model, trains, state=middle)
                if sparsifier.round == 0:
                    state = sparsifier.next_round()
            ends.append(model.state_dict())
        for other in ends[1:]:
            assert all(torch.equal(v, other[k]) for k, v in ends[0].items())

    def test_what_does_not_fit_is_refused(self, tmp_path):
        method = IMP(sparsity=0.75, prune=0.5, steps=STEPS, rewind=0.2)
        with pytest.raises(KeyboardInterrupt):
            find_ticket(method, net(), Loop(method, stop=1), folder=tmp_path)
        other = IMP(sparsity=0.75, prune=0.5, steps=STEPS, rewind=0.3)
        with pytest.raises(GossamerError, match="another search .rewind differs"):
            find_ticket(other, net(), Loop(other), folder=tmp_path)
        with pytest.raises(GossamerError, match="layers 0.weight"):
            find_ticket(
                method, nn.ModuleDict({"a": nn.Linear(8, 4)}), Loop(method), folder=tmp_path
            )
        wide = nn.Sequential(nn.Linear(8, 20), *list(net())[1:4], nn.Linear(20, 4))
        with pytest.raises(GossamerError, match="packed mask|go on with the model"):
            find_ticket(method, wide, Loop(method), folder=tmp_path)
        (tmp_path / "gossamer_rounds.safetensors").write_bytes(b"nothing")
        with pytest.raises(GossamerError, match="holds no rounds of training"):
            find_ticket(method, net(), Loop(method), folder=tmp_path)


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

    def test_a_loop_that_does_not_attach_or_stops_early_or_twice(self):
        method = IMP(sparsity=0.5, prune=0.5, steps=STEPS)

        def short(model, attach):
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1))

        def twice(model, attach):
            short(model, attach)
            short(model, attach)

        with pytest.raises(GossamerError, match="train did not attach"):
            find_ticket(method, net(), lambda model, attach: None)
        with pytest.raises(GossamerError, match="ended at update 0, the training lasts 10"):
            find_ticket(method, net(), short)
        model = net()
        with pytest.raises(GossamerError, match="attached twice"):
            find_ticket(method, model, twice)
        assert not model[0].weight._backward_hooks

    def test_by_hand(self):
        method = IMP(sparsity=0.5, prune=0.5, steps=2)
        model = net()
        sparsifier = method.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(GossamerError, match="trained for 0 of 2 updates"):
            sparsifier.next_round()
        warnings = sparsifier.finish().report().warnings
        assert any("ended after round 0 of 1" in text for text in warnings)

    def test_another_optimizer_in_a_later_round(self):
        method = IMP(sparsity=0.5, prune=0.5, steps=STEPS)
        loop = Loop(method)
        makers = iter([loop.make, lambda p: torch.optim.SGD([{"params": [q]} for q in p], lr=0.1)])
        loop.make = lambda p: next(makers)(p)
        with pytest.raises(GossamerError, match="the optimizer is not the first round's"):
            find_ticket(method, net(), loop)


def test_the_ticket_is_what_was_trained():
    method = IMP(sparsity=0.5, prune=0.5, steps=STEPS, rewind=0.2)
    loop = Loop(method)
    work = find_ticket(method, net(), loop)
    for path, bits in work.ticket["masks"].items():
        assert torch.equal(unpack_bits(bits, loop.masks[1][path].shape), loop.masks[1][path])
