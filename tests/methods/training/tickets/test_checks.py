"""The doubles of a ticket: what is kept, moved and drawn anew."""

import torch
from torch import nn

from gossamer.core import unpack_bits
from gossamer.methods.training.imp import IMP
from gossamer.methods.training.tickets.checks import CHECKS, ticket_checks
from gossamer.methods.training.tickets.rounds import find_ticket
from tests.methods.training.tickets.loops import STEPS, Loop, net


def test_found_shuffled_and_drawn_anew():
    method = IMP(sparsity=0.75, prune=0.5, steps=STEPS, rewind=0.2)
    loop = Loop(method)
    work = find_ticket(method, net(), loop)
    assert work.ticket is not None
    masks = {
        path: unpack_bits(bits, tuple(net().get_parameter(path).shape))
        for path, bits in work.ticket["masks"].items()
    }
    seen = []

    def run(model: nn.Module, attach) -> float:
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        trains = loop.make(model.parameters())
        sparsifier = attach(model, trains)
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        held = {path: one.mask.clone() for path, one in sparsifier.held.items()}
        seen.append((start, now, held, sparsifier.updates, sparsifier.kept()))
        sparsifier.remove()
        return float(len(seen))

    assert ticket_checks(work, net, run, seed=4) == dict(zip(CHECKS, (1.0, 2.0, 3.0), strict=True))
    found, shuffled, anew = seen
    point = work.ticket["point"]["weights"]
    for name in ("0.weight", "4.weight"):
        assert torch.equal(found[2][name], masks[name])
        assert torch.equal(found[1][name], point[name] * masks[name])
        assert torch.equal(shuffled[1][name], point[name] * shuffled[2][name])
        assert torch.equal(anew[1][name], anew[0][name] * masks[name])
        assert not torch.equal(anew[0][name], net(4).get_parameter(name))
    assert not torch.equal(shuffled[2]["0.weight"], masks["0.weight"])
    assert found[4] == shuffled[4] == anew[4]
    assert [one[3] for one in seen] == [2, 2, 0]
