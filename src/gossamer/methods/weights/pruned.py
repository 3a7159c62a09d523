"""A pruned model: what a method saw, what it decided, and how that is undone and saved.

Shapes: O = out features, I = in features of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import (
    GossamerError,
    Method,
    Selection,
    Site,
    Stat,
    pack_bits,
    unpack_bits,
)
from gossamer.models import Applied, Report, SiteRow, State, at_work

__all__ = ["LayerView", "Pruned", "PrunedModel"]


@dataclass(frozen=True)
class LayerView:
    """What a method sees of a layer while it decides.

    Parameters
    ----------
    site : which matrix of the model.
    weight : (O, I), the current values.
    stats : what the method's ``needs`` named, measured on the already pruned stream.
    seed : differs from layer to layer, fixed by the method's seed and the layer's place.
    known : scores (O, I) that the allocation already needed, or None.
    memo : what a method keeps from one layer of a block to the next, such as the factor of a
        Hessian that several layers share; forgotten with the block.
    """

    site: Site
    weight: Tensor
    stats: Mapping[Stat, Any]
    seed: int
    known: Tensor | None = None
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    def stat(self, stat: Stat) -> Any:
        """A measured statistic."""
        return self.stats[stat]


@dataclass(frozen=True)
class Pruned:
    """A method's decision for one layer.

    Parameters
    ----------
    selection : which weights stay, shape (O, I).
    weight : new values of the survivors, (O, I), or None when they keep theirs.
    warnings : what a user should know about this layer, without its name.
    """

    selection: Selection
    weight: Tensor | None = None
    warnings: tuple[str, ...] = ()


class PrunedModel(Applied):
    """A model whose weights were pruned; the zeros are in its parameters.

    Masked-dense: the arithmetic is still dense, so ``simulated`` is True.
    """

    def __init__(self, method: Method, model: nn.Module, *, undo: bool) -> None:
        super().__init__(method, model)
        self.undo = undo
        self.sites: dict[str, Site] = {}
        self.kept: dict[str, int] = {}
        self.masks: dict[str, Tensor] = {}
        self.warnings: list[str] = []
        self.scores: dict[str, Tensor] = {}
        self._removed: dict[str, Tensor] = {}
        self._sparser: dict[str, float] = {}
        self._join()

    def usable(self, site: Site, stats: Mapping[Stat, Any]) -> Mapping[Stat, Any]:
        """An expert that saw no token has norms of zero, which rank nothing: take them as one.

        Likewise its Hessian, whose diagonal holds the squared norms: the identity.
        """
        norm, hessian = stats.get(Stat.INPUT_L2), stats.get(Stat.HESSIAN)
        loud = norm if norm is not None else None if hessian is None else hessian.diagonal()
        if loud is None or bool(loud.any()):
            return stats
        self.warnings.append(f"{site.name} saw no calibration token; pruned by magnitude")
        usable = dict(stats)
        if norm is not None:
            usable[Stat.INPUT_L2] = torch.ones_like(norm)
        if hessian is not None:
            usable[Stat.HESSIAN] = torch.eye(len(hessian), device=hessian.device)
        return usable

    def write(self, site: Site, weight: Tensor, pruned: Pruned) -> None:
        """Put a decision into the model, keeping what undoing it needs."""
        mask = pruned.selection.mask()
        self.warnings += [f"{site.name}: {text}" for text in pruned.warnings]
        if self.undo:
            changed = pruned.weight is not None
            self._removed[site.name] = weight.clone() if changed else weight[~mask]
        if pruned.weight is not None:
            weight.copy_(pruned.weight)
        weight.masked_fill_(~mask, 0)
        self.sites[site.name] = site
        self.kept[site.name] = pruned.selection.kept
        nonzero = int(weight.count_nonzero())
        if pruned.selection.kept - nonzero > site.size // 1000:
            self._sparser[site.name] = 1.0 - nonzero / site.size
        self.masks[site.name] = pack_bits(mask)

    def selection(self, name: str) -> Selection:
        """What stays of one site."""
        return Selection.from_mask(unpack_bits(self.masks[name], self.sites[name].shape))

    @torch.no_grad()
    def _undo(self) -> None:
        if not self.undo:
            raise GossamerError("pruned without undo: load the model again to have it dense")
        works = at_work(self.model)
        later = [w for w in works[works.index(self) + 1 :] if isinstance(w, PrunedModel)]
        if later:
            # Its removed values were taken from the model as this pruning left it.
            raise GossamerError(
                f"{later[-1].method.key()} pruned the same weights later; restore that first"
            )
        for name, removed in self._removed.items():
            weight = self.sites[name].weight(self.model)
            if removed.dim() == 2:
                weight.copy_(removed)
            else:
                mask = unpack_bits(self.masks[name], self.sites[name].shape)
                weight[~mask] = removed
        self._removed.clear()

    def forget(self) -> None:
        """Leave the model as it is and stop counting as at work on it."""
        self._leave()

    @torch.no_grad()
    def enforce(self) -> None:
        """Set every removed weight to zero again, for example after an optimizer step."""
        for name in self.masks:
            self.selection(name).apply_(self.sites[name].weight(self.model))

    def state(self) -> State:
        return State(
            {"sites": list(self.masks)}, {f"mask.{n}": mask for n, mask in self.masks.items()}
        )

    def report(self) -> Report:
        rows = tuple(
            SiteRow(name, site.role, site.block, site.size, 1.0 - self.kept[name] / site.size)
            for name, site in self.sites.items()
        )
        total = sum(p.numel() for p in self.model.parameters())
        return Report(
            self.method.to_dict(),
            rows,
            "weights",
            total,
            self.simulated,
            notes=self._notes(),
            warnings=tuple(self.warnings),
        )

    def _notes(self) -> tuple[str, ...]:
        """Zeros beyond those asked for: weights that were zero already stay zero."""
        if not self._sparser:
            return ()
        most = max(self._sparser, key=lambda name: self._sparser[name])
        return (
            f"weights that were zero before stay zero: {len(self._sparser)} of {len(self.sites)} "
            f"layers are sparser than asked for, most {most} ({self._sparser[most]:.1%})",
        )

    def weight_bytes_saved(self) -> int:
        saved = 0
        for name, site in self.sites.items():
            item = getattr(site.owner(self.model), site.parameter).element_size()
            read = self.kept[name] * item + -(-site.size // 8)
            saved += max(0, site.size * item - read)
        return saved
