"""Rounds of training: resuming them to the bit, and loops that do not fit."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer.core import GossamerError
from gossamer.methods.training.imp import IMP
from gossamer.methods.training.tickets.rounds import find_ticket
from tests.methods.training.tickets.loops import STEPS, Loop, batch, net
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model


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


class TestLoops:
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

    def test_another_optimizer_in_a_later_round(self):
        method = IMP(sparsity=0.5, prune=0.5, steps=STEPS)
        loop = Loop(method)
        makers = iter([loop.make, lambda p: torch.optim.SGD([{"params": [q]} for q in p], lr=0.1)])
        loop.make = lambda p: next(makers)(p)
        with pytest.raises(GossamerError, match="the optimizer is not the first round's"):
            find_ticket(method, net(), loop)
