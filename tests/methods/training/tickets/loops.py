"""A small network and a loop of one's own, for the tests of tickets."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

__all__ = ["STEPS", "Loop", "batch", "net"]

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
