"""Rotate what attention and MLPs read, so that the columns of W_k and W_gate become orthogonal.

With W_k diag(g) = U S V^T, the matrix W' = W_k diag(g) V = U S has orthogonal columns. If the norm
in front gives x' = V^T x instead of g * x, with its gain g folded into its readers, every product
is what it was. Shapes: H = hidden size.

A change of basis on every residual shortcut, as the paper has it, moves the stream itself into the
basis of the next reader; here the stream stays where it is and the basis changes behind the norm.
RMSNorm without gain commutes with rotations, so readers see the same x', with or without masks, at
the same price of one H x H matrix per attention and per MLP. Embeddings, head and writers stay as
they are: nothing is untied.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import Site, UnsupportedModel
from gossamer.models import SiteMap
from gossamer.models.capture import evaluating

__all__ = ["Rotation", "orthogonal_basis"]

KEY_ROLES = ("attention.k", "attention.qkv")
GATE_ROLES = ("mlp.gate", "mlp.gate_up")


def orthogonal_basis(weight: Tensor, gain: Tensor) -> Tensor:
    """V (H, H) of W diag(g) = U S V^T, in float64.

    Parameters
    ----------
    weight : (O, H). gain : (H,).
    """
    folded = weight.double() * gain.double()
    return torch.linalg.svd(folded, full_matrices=True).Vh.T.contiguous()


@dataclass(frozen=True, eq=False)
class _Place:
    """A norm, the matrices that read it, and the one whose columns become orthogonal."""

    norm: str
    readers: tuple[Site, ...]
    chosen: Site


class Rotation:
    """A model whose norms hand on rotated states to rotated readers; undone by :meth:`undo`.

    Parameters
    ----------
    bases : by norm, what :attr:`tensors` held when the model was saved; None finds them.

    Raises
    ------
    UnsupportedModel
        For experts, for norms that centre or that other parts read too, or where the rotated
        model does not compute what the model did.
    """

    def __init__(
        self, model: nn.Module, sites: SiteMap, bases: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model, self.bases = model, dict[str, Tensor]()
        self._kept: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        places = _places(model, sites)
        before = _probe(model, sites)
        try:
            for place in places:
                self._rotate(place, None if bases is None else bases[f"basis.{place.norm}"])
            off = float((_probe(model, sites) - before).norm() / before.norm().clamp_min(1e-30))
            if not off < (1e-3 if next(model.parameters()).dtype == torch.float32 else 1e-1):
                raise UnsupportedModel(
                    f"rotated, {type(model).__name__} gives outputs {off:.1e} off; use "
                    "transform=False"
                )
        except BaseException:
            self.undo()
            raise

    @torch.no_grad()
    def _rotate(self, place: _Place, basis: Tensor | None) -> None:
        norm: Any = self.model.get_submodule(place.norm)
        gain, neutral = _gain(norm)
        if basis is None:
            basis = orthogonal_basis(place.chosen.weight(self.model), gain)
        basis = basis.double()
        for site in place.readers:
            self._keep(f"{site.module}.{site.parameter}")
            weight = site.weight(self.model)
            site.write(self.model, ((weight.double() * gain.double()) @ basis).to(weight.dtype))
        self._keep(f"{place.norm}.weight")
        norm.weight.fill_(neutral)
        turn = basis.to(norm.weight.dtype)
        self.bases[place.norm] = turn

        def leave(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return out @ turn.to(out)

        self._handles.append(norm.register_forward_hook(leave))

    def _keep(self, name: str) -> None:
        self._kept[name] = self.model.get_parameter(name).detach().clone()

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices every token reads for the changes of basis."""
        return sum(basis.nbytes for basis in self.bases.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What rotates the model in the same way again."""
        return {f"basis.{norm}": basis.clone() for norm, basis in self.bases.items()}

    def plain(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with the weights as they were."""
        return {name: self._kept.get(name, tensor) for name, tensor in tensors.items()}

    @contextmanager
    def original(self) -> Iterator[None]:
        """While open, the parameters hold the weights as they were."""
        rotated = {name: self.model.get_parameter(name).data for name in self._kept}
        try:
            for name, kept in self._kept.items():
                self.model.get_parameter(name).data = kept
            yield
        finally:
            for name, data in rotated.items():
                self.model.get_parameter(name).data = data

    @torch.no_grad()
    def undo(self) -> None:
        """Put every weight back bit for bit, and take the hooks away."""
        while self._handles:
            self._handles.pop().remove()
        while self._kept:
            name, kept = self._kept.popitem()
            self.model.get_parameter(name).copy_(kept)


def _unsupported(why: str) -> UnsupportedModel:
    return UnsupportedModel(f"{why}; use transform=False")


def _gain(norm: Any) -> tuple[Tensor, float]:
    """The factor an RMSNorm puts on each channel, and the parameter value that makes it 1."""
    weight = norm.weight.detach()
    # Of equal entries the root mean square is the entry: what comes out is the gain.
    found = norm(torch.full_like(weight, 1e3)[None, None])[0, 0]
    for offset in (0.0, 1.0):
        if torch.allclose(found.float(), weight.float() + offset, rtol=1e-2, atol=1e-3):
            return weight.double() + offset, 1.0 - offset
    raise _unsupported(f"{type(norm).__name__} is no RMSNorm with a gain")


def _places(model: nn.Module, sites: SiteMap) -> list[_Place]:
    if any(site.expert is not None or site.role == "experts.router" for site in sites.sites):
        raise _unsupported("a router reads what its experts read, and experts are stacked")
    norms = _norms_of(model, sites)
    places: list[_Place] = []
    for block in range(len(sites.blocks)):
        inside = sites.in_block(block)
        for roles, part in ((KEY_ROLES, "attention."), (GATE_ROLES, "mlp.")):
            chosen = next((s for r in roles for s in inside if s.role == r), None)
            norm = None if chosen is None else norms.get(chosen.module)
            if chosen is None or norm is None:
                raise _unsupported(f"what block {block}'s {part[:-1]} reads comes from no norm")
            readers = tuple(s for s in inside if norms.get(s.module) == norm)
            if any(not s.role.startswith(part) for s in readers):
                raise _unsupported("attention and MLP read the same norm")
            module: Any = model.get_submodule(norm)
            if not isinstance(getattr(module, "weight", None), Tensor) or (
                getattr(module, "bias", None) is not None
            ):
                raise _unsupported(f"{type(module).__name__} is no RMSNorm with a gain")
            _gain(module)
            places.append(_Place(norm, readers, chosen))
    return places


def _norms_of(model: nn.Module, sites: SiteMap) -> dict[str, str]:
    """Module of a matrix to the norm whose output it reads, seen in one pass."""
    made: dict[int, tuple[Tensor, str]] = {}
    found: dict[str, str] = {}
    handles: list[Any] = []

    def watch_norm(path: str, module: nn.Module) -> None:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                made[id(out)] = (out, path)

        handles.append(module.register_forward_hook(leave))

    def watch_reader(path: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in made:
                found[path] = made[id(args[0])][1]

        handles.append(module.register_forward_pre_hook(enter))

    try:
        for path, module in model.named_modules():
            if "norm" in type(module).__name__.lower():
                watch_norm(path, module)
        for site in sites.sites:
            watch_reader(site.module, model.get_submodule(site.module))
        _probe(model, sites)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _probe(model: nn.Module, sites: SiteMap) -> Tensor:
    """What the model gives for a few made-up tokens."""
    base: Any = model.get_submodule(sites.base)
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Embedding):
        raise _unsupported(f"{type(model).__name__} takes no token ids")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.num_embeddings, (1, 16), generator=generator)
    with evaluating(model):
        out: Any = base(input_ids=ids.to(embedding.weight.device))
    return out[0].float()
