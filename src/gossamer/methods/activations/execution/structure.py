"""Blocks whose decode step can run as one native call, recognised by their parts.

Nothing is known by an architecture's name: a block has two norms, an attention of q, k, v, o and
an MLP of gate, up, down; what cannot be seen from the parts (the order of things, a norm's form)
is settled by trying: the step is taken only where it gives what the model itself gives.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import Site
from gossamer.kernels.gather_gemv.reference import ACTIVATIONS
from gossamer.models import SiteMap

__all__ = ["BlockParts", "ModelParts", "activation_of", "model_parts"]

_PROJECTIONS = ("attention.q", "attention.k", "attention.v", "attention.o")
_MLP = ("mlp.gate", "mlp.up", "mlp.down")


@dataclass(frozen=True)
class BlockParts:
    """The modules of one block.

    Parameters
    ----------
    linears : by role. act : name of the MLP's activation.
    norms : before attention, before the MLP. head_norms : of queries and keys, or None.
    """

    linears: dict[str, nn.Linear]
    sites: dict[str, Site]
    act: str
    norms: tuple[nn.Module, nn.Module]
    head_norms: tuple[nn.Module, nn.Module] | None


@dataclass(frozen=True)
class ModelParts:
    """What a decode step needs beside the blocks."""

    blocks: tuple[BlockParts, ...]
    embed: nn.Embedding
    rotary: nn.Module
    norm: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    epsilon: float


def activation_of(module: Any) -> str | None:
    """The name under which kernels know an activation, found by its values; None if they do not."""
    x = torch.linspace(-6, 6, 101)
    try:
        with torch.no_grad():
            y = module.forward(x)  # without the hooks of a gate that may sit there
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    return next((n for n, f in ACTIVATIONS.items() if torch.allclose(y, f(x), atol=1e-6)), None)


def _vector(module: nn.Module) -> bool:
    """A norm: one vector of weights and nothing else."""
    found = dict(module.named_parameters(recurse=False))
    return list(found) == ["weight"] and found["weight"].dim() == 1


def _epsilon(norm: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    return None


def _block(model: nn.Module, sites: SiteMap, index: int) -> BlockParts | None:
    block = model.get_submodule(sites.blocks[index])
    here = {site.role: site for site in sites.in_block(index)}
    if set(here) != {*_PROJECTIONS, *_MLP} or len(sites.in_block(index)) != len(here):
        return None
    linears = {role: model.get_submodule(site.module) for role, site in here.items()}
    if not all(type(module) is nn.Linear for module in linears.values()):
        return None
    attention = model.get_submodule(sites.attentions[index])
    mlp = model.get_submodule(here["mlp.gate"].module.rpartition(".")[0])
    norms = [child for child in block.children() if _vector(child)]
    head_norms = [child for child in attention.children() if _vector(child)]
    known = sum(p.numel() for m in (*linears.values(), *norms, *head_norms) for p in m.parameters())
    act = activation_of(getattr(mlp, "act_fn", None))
    if (
        len(norms) != 2
        or len(head_norms) not in (0, 2)
        or act is None
        or known != sum(p.numel() for p in block.parameters())
    ):
        return None
    typed: dict[str, Any] = linears
    return BlockParts(
        typed,
        here,
        act,
        (norms[0], norms[1]),
        (head_norms[0], head_norms[1]) if head_norms else None,
    )


def model_parts(model: nn.Module, sites: SiteMap) -> ModelParts | None:
    """The parts of a model whose decode step may run natively, or None."""
    base: Any = model.get_submodule(sites.base)
    blocks = [_block(model, sites, index) for index in range(len(sites.blocks))]
    norms = [child for child in base.children() if _vector(child)]
    rotaries = [child for child in base.children() if hasattr(child, "inv_freq")]
    embed = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    attention: Any = model.get_submodule(sites.attentions[0]) if sites.attentions else None
    head_dim = getattr(attention, "head_dim", None)
    scaling = getattr(attention, "scaling", None)
    epsilon = _epsilon(norms[0]) if len(norms) == 1 else None
    if (
        not all(blocks)
        or len(rotaries) != 1
        or type(embed) is not nn.Embedding
        or not isinstance(head_dim, int)
        or not isinstance(scaling, float)
        or epsilon is None
    ):
        return None
    found = tuple(block for block in blocks if block is not None)
    every = [norm for block in found for norm in (*block.norms, *(block.head_norms or ()))]
    if any(_epsilon(norm) != epsilon for norm in every):
        return None
    first = found[0].linears
    return ModelParts(
        found,
        embed,
        rotaries[0],
        norms[0],
        first["attention.q"].out_features // head_dim,
        first["attention.k"].out_features // head_dim,
        head_dim,
        scaling,
        epsilon,
    )
