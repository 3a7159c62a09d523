"""Two processes, replicated or sharded, hold the same masks, and those of one process.

One pair of processes runs everything, since starting it costs more than what it does.
"""

import copy
import hashlib
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import CausalLMOutput

from gossamer.core import GossamerError, pack_bits
from gossamer.methods.training.ast import AST
from gossamer.methods.training.cast import CAST
from gossamer.methods.training.gmp import GMP
from gossamer.methods.training.gradient_flow import GradientFlow
from gossamer.methods.training.granet import GraNet
from gossamer.methods.training.grasp import GraSP
from gossamer.methods.training.imp import IMP
from gossamer.methods.training.random_pruning import RandomPruning
from gossamer.methods.training.random_search import RandomSearch
from gossamer.methods.training.rigl import RigL
from gossamer.methods.training.set import SET
from gossamer.methods.training.snip import SNIP
from gossamer.methods.training.sparsifier.checkpoint import read_state, write_state
from gossamer.methods.training.sr_ste import SRSTE
from gossamer.models import load_model
from gossamer.models.store import read_stages
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

METHODS = {
    "rigl": RigL(sparsity=0.6, steps=6, every=2),
    "set": SET(sparsity=0.6, steps=6, every=2),
    "granet": GraNet(sparsity=0.6, steps=6, every=2),
    "gmp": GMP(sparsity=0.6, steps=6, every=2, pattern="model", keep_removed=True),
    "gmp_rows": GMP(sparsity=0.5, steps=6, every=3, pattern="row"),
    "random": RandomPruning(sparsity=0.6, steps=6),
    "snip": SNIP(sparsity=0.6, steps=6),
    "sr_ste": SRSTE(steps=6),
    "cast": CAST(steps=6, every=2, pull=1e-2),
    "ast": AST(steps=6, every=2, slorb=4, distill=0.0),
    "fading": GradientFlow(steps=6, dense=0.2),
}
REPLICATED = ("rigl", "set", "granet", "snip", "sr_ste", "cast", "ast", "fading")
RESUMED = ("rigl", "gmp", "cast", "ast", "fading")
VISIBLE = ("cast", "fading", "ast")
"""Compute with more than the kept weights until the end."""


class Net(nn.Module):
    """Heads of three and one outputs, so that processes hold unequal rows, or none."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 16)
        self.three, self.one = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x, labels=None):
        x = self.second(self.first(x).relu()).relu()
        logits = torch.cat((self.three(x), self.one(x)), -1)
        loss = None if labels is None else cross_entropy(logits, labels)
        return CausalLMOutput(loss=loss, logits=logits)


def replicated(net):
    return DistributedDataParallel(net)


def sharded(net, mesh=None, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (2,))
    for module in (net.first, net.second, net):
        fully_shard(module, mesh=mesh, **options)
    return net


def batch(step, rank, world):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, generator=generator)
    y = torch.randint(0, 4, (16,), generator=generator)
    return x.chunk(world)[rank], y.chunk(world)[rank]


def optimizer_of(key, model):
    if key in ("set", "gmp_rows"):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def begin(key, model, rank=0, world=1, **given):
    """Attach; the first loss is that of this process's share."""
    trains = optimizer_of(key, model)
    method = METHODS[key]
    if key == "snip":
        x, y = batch(99, rank, world)
        given["loss"] = lambda net: net(x, labels=y).loss
    if getattr(method, "distilled_share", 0.0):
        given["teacher"] = Net()
    return trains, method.attach(model, trains, **given)


def accumulate(key, model, step, rank, world):
    """Two parts of a share; reduced once or, where a method's key says so, twice."""
    x, y = batch(step, rank, world)
    once = key in ("rigl", "sr_ste", "fading")
    for part, (xs, ys) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
        waits = once and part == 0
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(not waits)
        alone = not isinstance(model, DistributedDataParallel)
        with nullcontext() if alone or not waits else model.no_sync():
            (model(xs, labels=ys).loss / 2).backward()


def train(key, model, trains, sparsifier, steps, rank=0, world=1):
    for step in steps:
        accumulate(key, model, step, rank, world)
        if key != "fading":
            # Faded gradients reach shards at the update only, so their norm is another one.
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        trains.step()
        sparsifier.step()
        trains.zero_grad()
        for one in sparsifier.held.values():
            if key not in VISIBLE:
                assert not one.shown[~one.mask].any()
            if key not in (*VISIBLE, "sr_ste"):
                for tensor in one.tensors(trains):
                    assert not tensor.detach()[~one.mask].any()


def full(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "device_mesh") else tensor.clone()


def outcome(sparsifier):
    """Masks and weights as wholes, after checking that all processes have the same masks."""
    masks = {layer.name: sparsifier.mask(layer.name) for layer in sparsifier.layers}
    digest = hashlib.sha256(b"".join(pack_bits(m).numpy().tobytes() for m in masks.values()))
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    assert len(set(digests)) == 1
    assert {name: int(mask.sum()) for name, mask in masks.items()} == sparsifier.kept()
    return masks, {name: full(p) for name, p in sparsifier.model.named_parameters()}


def check_resumed(key, whole, rank, folder):
    """Half a training, its state through a file, and the other half: the same to the bit."""
    half = sharded(Net())
    trains, sparsifier = begin(key, half, rank, 2)
    train(key, half, trains, sparsifier, range(3), rank, 2)
    weights = {name: value.clone() for name, value in half.state_dict().items()}
    state = trains.state_dict()
    write_state(sparsifier.state_dict(), folder / f"{key}.safetensors")
    dist.barrier()

    again = sharded(Net(seed=1))
    again.load_state_dict(weights)
    after = optimizer_of(key, again)
    after.load_state_dict(copy.deepcopy(state))
    given = {"teacher": Net()} if getattr(METHODS[key], "distilled_share", 0.0) else {}
    saved = read_state(folder / f"{key}.safetensors")
    rest = METHODS[key].attach(again, after, state=saved, **given)
    train(key, again, after, rest, range(3, 6), rank, 2)
    for path, one in whole.held.items():
        assert torch.equal(one.mask, rest.held[path].mask)
        assert torch.equal(one.shown, rest.held[path].shown)
    assert rest.flops.to_dict() == whole.flops.to_dict()


def check_precision(key, rank):
    """Weights in half precision, which FSDP2 makes of float32 shards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(Net(), mp_policy=policy)
    trains, sparsifier = begin(key, model, rank, 2)
    train(key, model, trains, sparsifier, range(4), rank, 2)
    assert all(one.shown.dtype == torch.float32 for one in sparsifier.held.values())
    outcome(sparsifier)


def check_meshes(key, rank, masks):
    """Copies of shards (HSDP), and shards of inputs where sides divide, give the same masks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    def inputs(parameter):
        return Shard(1 if parameter.dim() == 2 else 0)

    for options in (
        {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))},
        {"shard_placement_fn": inputs},
    ):
        model = sharded(Net(), **options)
        trains, sparsifier = begin(key, model, rank, 2)
        train(key, model, trains, sparsifier, range(6), rank, 2)
        found, _ = outcome(sparsifier)
        for layer, mask in masks.items():
            assert torch.equal(mask, found[layer]), (key, layer, options)


def check_refusals(rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    with pytest.raises(GossamerError, match="flat parameters.*fully_shard"):
        METHODS["rigl"].attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    net = sharded(Net())
    trains = torch.optim.AdamW(net.parameters())
    with pytest.raises(GossamerError, match="cannot be copied; attach with teacher="):
        METHODS["cast"].attach(net, trains)
    for method in (IMP(sparsity=0.5, steps=4), RandomSearch(sparsity=0.5, steps=4)):
        with pytest.raises(GossamerError, match="whole weights, and these are sharded"):
            method.attach(net, trains)
    x, y = batch(99, rank, 2)
    method = GraSP(sparsity=0.5, steps=2)

    def loss(model):
        return model(x, labels=y).loss

    with pytest.raises(GossamerError, match="attach before sharding"):
        method.attach(net, trains, loss=loss)
    # The way that the message names.
    before = Net()
    found = method.attach(before, torch.optim.AdamW(before.parameters()), loss=loss)
    state = found.state_dict()
    found.remove()
    after = sharded(before)
    again = method.attach(after, torch.optim.AdamW(after.parameters()), state=state)
    for layer in found.layers:
        assert torch.equal(found.mask(layer.name), again.mask(layer.name))
    outcome(again)


def check_saving(rank, folder):
    """A language model, sharded block by block, trained and saved."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = tiny_model("llama"), init_device_mesh("cpu", (2,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    trains = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsifier = RigL(sparsity=0.75, steps=2, every=1, until=1.0).attach(model, trains)
    for _ in range(2):
        ids = random_tokens().input_ids[rank : rank + 1]
        model(input_ids=ids, labels=ids).loss.backward()
        trains.step()
        sparsifier.step()
        trains.zero_grad()
    work = sparsifier.finish()
    work.save(folder / "saved")
    with pytest.raises(GossamerError, match="exists and is not empty|rank 0 could not save"):
        work.save(folder / "saved")
    whole = {name: full(value) for name, value in model.state_dict().items()}
    if rank == 0:
        torch.save((whole, work.masks), folder / "saved.pt")


def check_states(key, sparsifier, folder):
    """A state names its number of processes, and goes on with as many only."""
    state = sparsifier.state_dict()
    assert state["world_size"] == 2
    with pytest.raises(GossamerError, match="saved by 1 processes, now there are 2") as caught:
        sparsifier.load_state_dict({**state, "world_size": 1})
    assert "\n" not in str(caught.value)
    if key == "gmp" and dist.get_rank():
        short = {path: value[:1] for path, value in read_shards(state).items()}
        with pytest.raises(GossamerError, match="go on sharded as the training was"):
            sparsifier._take(short)


def read_shards(state):
    return {path: value.to_local() for path, value in state["removed"].items()}


def worker(rank, folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found = {}
    for key in METHODS:
        for name, spread in (("ddp", replicated), ("fsdp2", sharded)):
            if name == "ddp" and key not in REPLICATED:
                continue
            model = spread(Net())
            trains, sparsifier = begin(key, model, rank, 2)
            train(key, model, trains, sparsifier, range(6), rank, 2)
            check_states(key, sparsifier, folder)
            if name == "fsdp2" and key in RESUMED:
                check_resumed(key, sparsifier, rank, folder)
            masks, weights = outcome(sparsifier)
            work = sparsifier.finish()
            ends = {n: full(p) for n, p in sparsifier.model.named_parameters()}
            found[name, key] = (masks, weights, ends, work.report().sparsity)
    for key in ("rigl", "sr_ste", "cast"):
        check_precision(key, rank)
    for key in ("gmp", "sr_ste"):
        check_meshes(key, rank, found["fsdp2", key][0])
    check_refusals(rank, folder)
    check_saving(rank, folder)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file")
def test_processes_hold_the_masks_of_one(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert len(found) == len(METHODS) + len(REPLICATED)
    for key in METHODS:
        model = Net()
        trains, alone = begin(key, model)
        train(key, model, trains, alone, range(6))
        masks = {layer.name: alone.mask(layer.name) for layer in alone.layers}
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        sparsity = alone.finish().report().sparsity
        for name in ("ddp", "fsdp2"):
            if (name, key) not in found:
                continue
            theirs, at, ends, share = found[name, key]
            assert share == sparsity
            for layer, mask in masks.items():
                assert torch.equal(mask, theirs[layer]), (name, key, layer)
            for path, weight in model.named_parameters():
                assert torch.allclose(at[path], weights[path], atol=1e-5), (name, key, path)
                assert torch.allclose(ends[path], weight, atol=1e-5), (name, key, path)
    whole, masks = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = load_model(tmp_path / "saved", kind="any").model
    assert type(again).__name__ == "LlamaForCausalLM"
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole[name]), name
    (stage,) = read_stages(tmp_path / "saved")
    work = RigL(steps=2).reattach(again, stage.meta, stage.tensors)
    assert all(torch.equal(masks[name], mask) for name, mask in work.masks.items())
    assert work.report().sparsity == pytest.approx(0.75, abs=1e-3)
    # Another number of processes is refused here as well, of every kind of state.
    for key in ("rigl", "cast"):
        state = read_state(tmp_path / f"{key}.safetensors")
        model = Net()
        given = {"teacher": Net()} if key == "cast" else {}
        with pytest.raises(GossamerError, match="saved by 2 processes, now there are 1"):
            replace(METHODS[key]).attach(model, optimizer_of(key, model), state=state, **given)
