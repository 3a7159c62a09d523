"""Two processes under DistributedDataParallel hold the same masks, and those of one process."""

import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gossamer.core import GossamerError
from gossamer.methods.training.granet import GraNet
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.set import SET

METHODS = (
    RigL(sparsity=0.75, steps=8, every=2),
    SET(sparsity=0.75, steps=8, every=2),
    GraNet(sparsity=0.75, steps=8, every=2),
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(8, 8, generator=generator),
        torch.randint(0, 4, (8,), generator=generator),
    )


def train(model, method, rank, world):
    """Each rank sees its share of the batch, in two accumulated parts."""
    trains = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = method.attach(model, trains)
    for step in range(method.steps):
        x, y = (part.chunk(world)[rank] for part in batch(step))
        parts = list(zip(x.chunk(2), y.chunk(2), strict=True))
        if isinstance(model, DistributedDataParallel):
            with model.no_sync():
                (cross_entropy(model(parts[0][0]), parts[0][1]) / 2).backward()
            (cross_entropy(model(parts[1][0]), parts[1][1]) / 2).backward()
        else:
            for xs, ys in parts:
                (cross_entropy(model(xs), ys) / 2).backward()
        trains.step()
        sparsifier.step()
        trains.zero_grad()
    return sparsifier


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found = []
    for method in METHODS:
        sparsifier = train(DistributedDataParallel(net()), method, rank, 2)
        state = sparsifier.state_dict()
        assert state["world_size"] == 2
        masks = {path: one.mask for path, one in sparsifier.held.items()}
        weights = {path: one.weight.detach() for path, one in sparsifier.held.items()}
        found.append((masks, weights))
        # Changing the number of processes on resume is refused.
        with pytest.raises(GossamerError, match="saved by 1 processes, now there are 2"):
            sparsifier.load_state_dict({**state, "world_size": 1})
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file")
def test_masks_are_equal_on_every_rank_and_those_of_one_process(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for method, (masks, weights), (others, their) in zip(METHODS, *ranks, strict=True):
        alone = train(net(), method, 0, 1)
        for path, one in alone.held.items():
            assert torch.equal(masks[path], others[path])
            assert torch.equal(weights[path], their[path])
            assert not weights[path][~masks[path]].any()
            assert torch.equal(masks[path], one.mask), (method.key(), path)
            assert torch.allclose(weights[path], one.weight, atol=1e-5)
