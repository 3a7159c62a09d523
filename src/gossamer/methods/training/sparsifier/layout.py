"""Where the entries of a parameter are: all of them here, or in shards over processes (FSDP2).

What is decided entry by entry works on the part that is here; what needs a whole matrix gathers
one parameter at a time. Gathering and counting are collective: every process does them together.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gossamer.core import GossamerError, pack_bits, unpack_bits

N = TypeVar("N", int, float)

__all__ = [
    "Layout",
    "everywhere",
    "here",
    "is_sharded",
    "mean_everywhere",
    "rank",
    "reshard",
    "shards_itself",
    "size_of",
    "sum_over_processes",
    "world",
]


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among those that train together."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def here(tensor: Any) -> Tensor:
    """The part of a tensor on this process, sharing its memory; the tensor itself if whole."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor lies in parts over processes (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def mean_everywhere(tensor: Tensor) -> Tensor:
    """The mean over processes. Collective."""
    if world() == 1:
        return tensor
    total = tensor.detach().contiguous().clone()
    dist.all_reduce(total)
    return total / world()


class Layout:
    """How a parameter lies over processes.

    Parameters
    ----------
    weight : the parameter; sharded ones are those of ``fully_shard``.

    Attributes
    ----------
    shape : of the whole parameter. local : of what is here. sharded : this process holds a part.
    device : of what is here. working : where wholes are gathered.
    mine : this process is the one that counts its part, where parts are held more than once.

    Raises
    ------
    GossamerError
        If the parameter is split along more than one side, or not into plain shards.
    """

    def __init__(self, path: str, weight: Any) -> None:
        self.shape: tuple[int, ...] = tuple(weight.shape)
        self.mesh: Any = getattr(weight, "device_mesh", None)
        self.placements: tuple[Any, ...] = ()
        self.device = weight.device
        self.working: Any = weight.device
        self.sharded = self.mesh is not None
        self.local: tuple[int, ...] = tuple(here(weight).shape)
        self.mine = self.sharded or rank() == 0
        if not self.sharded:
            return
        from torch.distributed.tensor import Replicate, Shard

        self.placements = tuple(weight.placements)
        split = [p for p in self.placements if type(p) is Shard]
        copies = [p for p in self.placements if type(p) is Replicate]
        if len(split) > 1 or len(split) + len(copies) < len(self.placements):
            raise GossamerError(
                f"{path} lies over processes as {self.placements}; masks follow one plain shard "
                "of a side, as fully_shard alone makes it"
            )
        self.device, self.working = here(weight).device, self.mesh.device_type
        where = self.mesh.get_coordinate()
        self.mine = all(
            at == 0 for at, p in zip(where, self.placements, strict=True) if type(p) is Replicate
        )

    @property
    def rows(self) -> bool:
        """Whether what is here are whole rows of the first side."""
        return all(getattr(p, "dim", 0) == 0 for p in self.placements)

    def wrap(self, local: Tensor) -> Tensor:
        """The part that is here as a tensor that knows of the others; rows may be of any length."""
        if not self.sharded:
            return local
        from torch.distributed.tensor import DTensor

        shape = torch.Size((self.shape[0], *local.shape[1:]) if self.rows else self.shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride
        )

    def full(self, local: Tensor) -> Tensor:
        """The whole of which this is the part that is here. Collective."""
        if not self.sharded:
            return local
        kind = local.dtype
        sent = local.contiguous().view(torch.uint8) if kind == torch.bool else local.contiguous()
        wrapped: Any = self.wrap(sent.to(self.working))
        found: Tensor = wrapped.full_tensor()
        return found.view(torch.bool) if kind == torch.bool else found

    def part(self, full: Tensor) -> Tensor:
        """What of a whole belongs here."""
        if not self.sharded:
            return full
        from torch.distributed.tensor import distribute_tensor

        shard = distribute_tensor(full, self.mesh, self.placements, src_data_rank=None)
        return shard.to_local().clone().to(self.device)

    def added(self, tensor: Tensor) -> Tensor:
        """The sum over all shards of what each of them found. Collective."""
        for at, placement in enumerate(self.placements):
            if hasattr(placement, "dim"):
                sent = tensor.to(self.working, copy=True)
                dist.all_reduce(sent, group=self.mesh.get_group(at))
                tensor = sent.to(self.device)
        return tensor

    def agreed(self, mask: Tensor) -> Tensor:
        """The part of a whole mask that belongs here, as rank 0 decided it. Collective."""
        if world() == 1:
            return self.part(mask)
        bits = pack_bits(mask)
        dist.broadcast(bits, src=0)
        return self.part(unpack_bits(bits, tuple(mask.shape)))

    def taken(self, value: Any) -> Tensor:
        """The part of a saved value that belongs here: it may be sharded, whole, or the part.

        Raises
        ------
        GossamerError
            If it is neither.
        """
        whole = not is_sharded(value)
        found = here(value)
        if whole and found.shape[:1] == self.shape[:1] and tuple(found.shape) != self.local:
            found = self.part(found)
        if found.shape[:1] != self.local[:1]:
            raise GossamerError(
                f"saved values of shape {tuple(found.shape)} do not fit a weight of shape "
                f"{self.shape} of which {self.local} are on this process; "
                "go on sharded as the training was that was saved"
            )
        return found.to(self.device)


def everywhere(flag: bool, device: Any) -> bool:
    """Whether something holds on every process. Collective."""
    return sum_over_processes([int(not flag)], device) == [0]


def sum_over_processes(counts: list[N], device: Any) -> list[N]:
    """Numbers, added up over processes. Collective."""
    if world() == 1:
        return counts
    kind = torch.int64 if all(isinstance(count, int) for count in counts) else torch.float64
    total = torch.tensor(counts, dtype=kind, device=device)
    dist.all_reduce(total)
    return total.tolist()


def reshard(model: nn.Module) -> None:
    """Let every module that ``fully_shard`` wraps hold its shards, as between updates.

    Raises
    ------
    GossamerError
        If the model is wrapped in FullyShardedDataParallel, whose flat parameters have no rows.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise GossamerError(
                "FullyShardedDataParallel holds flat parameters, which have no rows to make "
                "sparse; shard the model with torch.distributed.fsdp.fully_shard"
            )
        if _wrapped(module):
            module.reshard()  # type: ignore[operator]


def shards_itself(model: nn.Module) -> bool:
    """Whether ``fully_shard`` wraps the model or a part of it."""
    return any(map(_wrapped, model.modules()))


def _wrapped(module: nn.Module) -> bool:
    return hasattr(module, "set_reshard_after_forward")
