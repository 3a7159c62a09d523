"""The feed-forward layers of a model as neurons, and small copies of them that hold a few.

Neuron j is row j of the gate and up matrices and column j of the down matrix. Keeping some
neurons of a layer is gathering these rows and columns: everything between the matrices acts on
each neuron alone, so the model's own code runs on the small matrices unchanged.
Shapes: B rows, E experts, F neurons, U gathered neurons, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Site
from gossamer.models import SiteMap

__all__ = ["Feedforward", "Slice", "feedforwards", "gather", "output_norms"]

_READERS = ("mlp.gate", "mlp.up", "mlp.gate_up")


@dataclass(frozen=True, eq=False)
class Feedforward:
    """One feed-forward layer, or one stack of experts.

    Parameters
    ----------
    name : path of the module that holds the down matrix (or the stack). block : index.
    readers : gate and up matrices; of every expert for a stack.
    writers : down matrices, one per expert.
    neurons : F, of each expert. stacked : the experts share two stacked parameters.
    """

    name: str
    block: int
    readers: tuple[Site, ...]
    writers: tuple[Site, ...]
    neurons: int
    stacked: bool

    @property
    def experts(self) -> int:
        """E; 1 for a plain layer."""
        return len(self.writers)


def feedforwards(sites: SiteMap, blocks: Sequence[int]) -> tuple[Feedforward, ...]:
    """The feed-forward layers of some blocks, in order.

    Raises
    ------
    GossamerError
        If a block has none, or experts whose neurons no matrix shows one by one.
    """
    found: list[Feedforward] = []
    for block in blocks:
        here, before = sites.in_block(block), len(found)
        for down in (s for s in here if s.role == "mlp.down"):
            readers = tuple(s for s in here if s.name in down.coupled and s.role in _READERS)
            found.append(Feedforward(down.module, block, readers, (down,), down.shape[1], False))
        stacks = dict.fromkeys(s.module for s in here if s.role == "experts.down")
        for module in stacks:
            own = [s for s in here if s.module == module]
            downs = tuple(s for s in own if s.role == "experts.down")
            readers = tuple(s for s in own if s.role == "experts.gate_up")
            found.append(Feedforward(module, block, readers, downs, downs[0].shape[1], True))
        if len(found) == before:
            raise GossamerError(
                f"block {block} has no feed-forward matrices known by role; choose other layers"
            )
    return tuple(found)


def output_norms(model: nn.Module, layer: Feedforward) -> Tensor:
    """Norm of what each neuron writes, float32 (E, F)."""
    columns = [torch.linalg.vector_norm(s.weight(model).float(), dim=0) for s in layer.writers]
    return torch.stack(columns)


@dataclass(frozen=True, eq=False)
class Slice:
    """The gathered neurons of one expert (or plain layer).

    Parameters
    ----------
    readers : module path to (weight (U or 2U, H), bias or None).
    down : (H, U). bias : (H,) of the down projection, or None.
    inside : which gathered neurons are each row's own, in the weights' dtype (B, U); None when
        all rows share all of them.
    """

    readers: dict[str, tuple[Tensor, Tensor | None]]
    down: Tensor
    bias: Tensor | None
    inside: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of the gathered matrices."""
        return self.down.nbytes + sum(weight.nbytes for weight, _ in self.readers.values())


def gather(model: nn.Module, layer: Feedforward, core: Tensor) -> tuple[Slice, ...] | None:
    """Copy the union of the rows' neurons out of a layer's matrices.

    Parameters
    ----------
    core : bool (B, E, F).

    Returns
    -------
    One slice per expert, or None where every neuron stays: then the layer itself is used.
    """
    union = core.any(0)
    if bool(union.all()) and bool(core.all()):
        return None
    return tuple(_slice(model, layer, e, union[e], core[:, e]) for e in range(layer.experts))


def _slice(model: nn.Module, layer: Feedforward, e: int, union: Tensor, core: Tensor) -> Slice:
    down = layer.writers[e]
    weight = down.weight(model)
    index = union.nonzero()[:, 0].to(weight.device)
    inside = core.to(weight.device)[:, index]
    readers: dict[str, tuple[Tensor, Tensor | None]] = {}
    for site in layer.readers:
        if site.expert is not None and site.expert != down.expert:
            continue
        # A fused matrix holds the gate's rows, then the up rows.
        parts = range(site.shape[0] // layer.neurons)
        rows = torch.cat([index + part * layer.neurons for part in parts])
        bias = _bias(model, site)
        small = site.weight(model)[rows].contiguous()
        readers[site.module] = (small, None if bias is None else bias[rows])
    return Slice(
        readers,
        weight[:, index].contiguous(),
        _bias(model, down),
        None if bool(inside.all()) else inside.to(weight.dtype),
    )


def _bias(model: nn.Module, site: Site) -> Tensor | None:
    bias = getattr(site.owner(model), "bias", None) if site.expert is None else None
    return None if bias is None else bias.detach()
