"""AttentionView: what one block's attention looked at and moved, in one forward pass.

Shapes: B = windows, T = destinations, S = sources, H = heads, G = value heads (H is a multiple),
E = width of a head, D = hidden width, O = outputs of a projection.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Site
from gossamer.methods.features.circuits.heads import head_count
from gossamer.methods.features.hooks import find_module, hidden_of, input_of
from gossamer.models import find_sites

__all__ = ["AttentionView", "eager", "tolerance", "views"]


@dataclass(frozen=True)
class AttentionView:
    """One block's attention: everything a head's output is made of.

    Parameters
    ----------
    block : its index.
    maps : (B, H, T, S), how much each destination takes from each source.
    values : (B, G, S, E). mixed : (B, T, H, E), what the heads hand to the output projection:
        the maps times the values.
    stream : (B, S, D), what the block was given. read : (B, S, D), what the values are made of,
        after the norm.
    weight : (G, E, D) and bias : (G, E), of the value projection.
    norm : path of the module between stream and read; None where there is none.
    """

    block: int
    maps: Tensor
    values: Tensor
    mixed: Tensor
    stream: Tensor
    read: Tensor
    weight: Tensor
    bias: Tensor
    norm: str | None

    @property
    def group(self) -> int:
        """Heads that share a value head."""
        return self.maps.shape[1] // self.values.shape[1]


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error that rounding explains in sums of products of a dtype."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """While open, attention is computed so that its maps can be read; then as it was before.

    Raises
    ------
    GossamerError
        If the model knows no other way than its own.
    """
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before == "eager":
        yield
        return
    change: Any = getattr(model, "set_attn_implementation", None)
    if change is None or before is None:
        raise GossamerError(
            f"{type(model).__name__} offers no attention implementation whose maps can be read; "
            "give a transformers model"
        )
    change("eager")
    try:
        yield
    finally:
        change(before)


class _Seen:
    """Hooks that keep what passes through modules, by a name of the caller's."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found, self.stack = model, dict[str, Any](), ExitStack()

    def given(self, key: str, path: str) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            # A copy: blocks may add to the tensor they were given.
            self.found[key] = input_of(args, kwargs, path).clone()

        module = find_module(self.model, path)
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        self.stack.callback(handle.remove)

    def returned(self, key: str, path: str, place: int | None = None) -> None:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if place is None:
                self.found[key] = hidden_of(output, path)
            elif isinstance(output, tuple | list) and len(output) > place:
                self.found[key] = output[place]

        handle = find_module(self.model, path).register_forward_hook(after)
        self.stack.callback(handle.remove)


@torch.no_grad()
def views(
    model: nn.Module, inputs: Mapping[str, Tensor], blocks: Sequence[int]
) -> dict[int, AttentionView]:
    """Attention of some blocks, from one forward pass with eager attention.

    That the maps times the values are what the heads hand over is checked for every block.

    Parameters
    ----------
    inputs : keyword arguments of the model.

    Raises
    ------
    GossamerError
        For a block that is not there, or attention that is no weighted sum of values.
    """
    found = find_sites(model)
    for block in blocks:
        if not 0 <= block < len(found.blocks):
            raise GossamerError(f"block is {block}; the model has 0 to {len(found.blocks) - 1}")
    seen = _Seen(model)
    with seen.stack, eager(model):
        for block in blocks:
            _watch(seen, model, block)
        model(**inputs)
    return {block: _view(model, seen.found, block) for block in blocks}


def _value_site(model: nn.Module, block: int) -> Site:
    sites = find_sites(model).select(("attention.v", "attention.qkv"), (block,))
    if not sites:
        raise GossamerError(f"block {block} of {type(model).__name__} has no value projection")
    return sites[0]


def _output_site(model: nn.Module, block: int) -> Site:
    sites = find_sites(model).select("attention.o", (block,))
    if not sites:
        raise GossamerError(f"block {block} of {type(model).__name__} has no output projection")
    return sites[0]


def _norms(model: nn.Module, block: int) -> list[str]:
    """Paths of a block's modules that may be the norm before attention."""
    path = find_sites(model).blocks[block]
    return [
        f"{path}.{name}"
        for name, module in find_module(model, path).named_modules()
        if name and isinstance(w := getattr(module, "weight", None), Tensor) and w.dim() == 1
    ]


def _watch(seen: _Seen, model: nn.Module, block: int) -> None:
    found, value = find_sites(model), _value_site(model, block).module
    seen.given(f"{block} stream", found.blocks[block])
    seen.given(f"{block} read", value)
    seen.returned(f"{block} value", value)
    seen.returned(f"{block} maps", found.attentions[block], place=1)
    seen.given(f"{block} mixed", _output_site(model, block).module)
    for path in _norms(model, block):
        seen.returned(f"{block} norm {path}", path)


def _layouts(fused: bool, heads: int, groups: int, width: int) -> list[Any]:
    """Ways in which a projection's O outputs can hold the values: (..., O) to (..., G, E)."""
    if not fused:
        return [lambda out: out.unflatten(-1, (groups, width))]
    return [
        lambda out: out[..., -groups * width :].unflatten(-1, (groups, width)),
        lambda out: out.unflatten(-1, (heads, 3, width))[..., 2, :],
    ]


def _view(model: nn.Module, found: dict[str, Any], block: int) -> AttentionView:
    maps = found.get(f"{block} maps")
    heads = head_count(model)
    if not isinstance(maps, Tensor) or maps.dim() != 4 or maps.shape[1] != heads:
        raise GossamerError(
            f"the attention of block {block} returns no maps; {type(model).__name__} is not "
            "supported"
        )
    stream, read, out, mixed = (
        found[f"{block} {name}"] for name in ("stream", "read", "value", "mixed")
    )
    mixed = mixed.unflatten(-1, (heads, -1))
    width, site = mixed.shape[-1], _value_site(model, block)
    config: Any = model.config
    groups = getattr(config.get_text_config(), "num_key_value_heads", None) or heads
    fused = site.role == "attention.qkv"
    bias = getattr(site.owner(model), "bias", None)
    weight = site.weight(model)
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
    for layout in _layouts(fused, heads, groups, width):
        try:
            values = layout(out).transpose(1, 2)
        except RuntimeError:
            continue  # The outputs do not divide so.
        made = torch.einsum(
            "bhts,bhse->bthe", maps, values.repeat_interleave(heads // values.shape[1], 1)
        )
        if float((made - mixed).norm()) <= tolerance(mixed.dtype) * float(mixed.norm()):
            norm = _between(model, found, block, stream, read)
            parts = layout(weight.T).permute(1, 2, 0), layout(bias)
            return AttentionView(block, maps, values, mixed, stream, read, *parts, norm)
    raise GossamerError(
        f"what the heads of block {block} hand over is not their maps times their values; "
        f"{type(model).__name__} gates or norms it, which attribution cannot follow"
    )


def _between(
    model: nn.Module, found: dict[str, Any], block: int, stream: Tensor, read: Tensor
) -> str | None:
    if torch.equal(stream, read):
        return None
    for path in _norms(model, block):
        out = found.get(f"{block} norm {path}")
        if out is not None and out.shape == read.shape and torch.equal(out, read):
            return path
    raise GossamerError(
        f"no norm of block {block} gives what its values are made of; {type(model).__name__} is "
        "not supported"
    )
