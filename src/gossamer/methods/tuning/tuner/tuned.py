"""A model that was tuned: folded into its own weights, or with its adapters still beside them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Selection, Site, pack_bits, unpack_bits
from gossamer.methods.tuning.tuner.adapter import CHILD
from gossamer.models import Applied, Report, SiteRow, State, at_work, find_sites

if TYPE_CHECKING:
    from gossamer.methods.tuning.base import Tuning
    from gossamer.methods.tuning.tuner.tuner import Tuner

__all__ = ["Tuned", "reattached"]


class Tuned(Applied):
    """What a tuning leaves behind. Masked-dense, so ``simulated`` is True.

    Folded, the model is the plain model with other weights. Not folded, :attr:`tuner` goes on
    training; a saved folder then holds the folded weights for every other tool, and beside them
    the adapters and the frozen matrices.

    Attributes
    ----------
    tuner : while the adapters are in the model, else None.
    losses : of every update, where gossamer's own loop trained.
    trained, size : how many numbers trained, and how many parameters the model itself has.
    """

    def __init__(
        self,
        method: "Tuning",
        model: nn.Module,
        *,
        tuner: "Tuner | None",
        undo: bool,
        masks: Mapping[str, Tensor] | None = None,
        trained: int = 0,
        notes: tuple[str, ...] = (),
        warnings: tuple[str, ...] = (),
    ) -> None:
        super().__init__(method, model)
        self.undo = undo
        self.tuner = tuner
        self.losses: tuple[float, ...] = ()
        self.sites: dict[str, Site] = dict(tuner.sites) if tuner else {}
        self.size = tuner.own if tuner else sum(p.numel() for p in model.parameters())
        self.trained = tuner.trainable if tuner else trained
        self._masks = dict(masks or {})
        self._notes = notes
        self._warnings = warnings
        self._before: dict[str, Tensor] = {}
        self._head: list[tuple[Tensor, Tensor]] = []
        self._join()

    @property
    def share(self) -> float:
        """Trained numbers over the parameters of the model itself."""
        return self.trained / self.size

    @property
    def rewrites(self) -> bool:
        """Whether undoing writes weights: once they are folded."""
        return self.tuner is None

    def selection(self, name: str) -> Selection:
        """What stays of one site, (O, I)."""
        if self.tuner is not None:
            selection = self.tuner.adapters[name].selection
            return Selection.everything(self.sites[name].shape) if selection is None else selection
        return Selection.from_mask(unpack_bits(self._masks[name], self.sites[name].shape))

    def fold(self) -> None:
        """Write the result into the model's own weights and take the adapters away.

        Keeps a copy of the frozen matrices if the method was attached with ``undo``. A second
        call does nothing.

        Raises
        ------
        GossamerError
            If a method applied later holds weights of the model.
        """
        if self.tuner is None:
            return
        works = at_work(self.model)
        for later in works[works.index(self) + 1 :]:
            if later.rewrites:
                raise GossamerError(
                    f"{later.method.key()} rewrote the weights later; restore that first"
                )
        tuner = self.tuner
        self._notes, self._warnings = self._remarks(tuner)
        self._masks = {name: pack_bits(self.selection(name).mask()).cpu() for name in self.sites}
        if self.undo:
            for name, site in self.sites.items():
                self._before.setdefault(name, site.weight(self.model).clone())
        tuner.fold()
        # Not the tuner itself: its adapters and masks are to be freed.
        self._head = tuner.head_before()
        self.tuner = None

    @torch.no_grad()
    def _undo(self) -> None:
        if not self.undo:
            raise GossamerError(
                "tuned without a copy of the weights before; attach with undo=True to restore, "
                "or load the model again"
            )
        works = at_work(self.model)
        if self._before and works[-1] is not self:
            raise GossamerError(
                f"{works[-1].method.key()} was applied to the tuned weights later; "
                "restore that first"
            )
        head = self._head
        if self.tuner is not None:
            self.tuner.remove()
            head = self.tuner.head_before()
        for name, value in self._before.items():
            self.sites[name].write(self.model, value)
        for parameter, value in head:
            parameter.copy_(value)

    def plain(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's own tensors, with the folded matrices in their places."""
        if self.tuner is None:
            return tensors
        plain = {name: t for name, t in tensors.items() if f".{CHILD}." not in name}
        for name, site in self.sites.items():
            folded = self.tuner.adapters[name].folded(site.weight(self.model))
            path = f"{site.module}.{site.parameter}"
            plain[path] = (folded.T if site.transposed else folded).contiguous()
        return plain

    def state(self) -> State:
        """Masks and notes; with adapters also these and the frozen matrices."""
        meta: dict[str, Any] = {
            "sites": list(self.sites),
            "folded": self.tuner is None,
            "trained": self.trained,
        }
        if self.tuner is None:
            meta |= {"notes": list(self._notes), "warnings": list(self._warnings)}
            return State(meta, {f"mask.{name}": mask for name, mask in self._masks.items()})
        state = self.tuner.state_dict()
        tensors = {f"tuner.{name}": value for name, value in state["tensors"].items()}
        for name, site in self.sites.items():
            tensors[f"frozen.{name}"] = site.weight(self.model)
        return State({**meta, "updates": state["updates"]}, tensors)

    def report(self) -> Report:
        """Sparsity of every matrix, the share of parameters that trained, the memory held."""
        notes, warnings = self._notes, self._warnings
        if self.tuner is not None:
            notes, warnings = self._remarks(self.tuner)
        rows = tuple(
            SiteRow(name, s.role, s.block, s.size, self.selection(name).sparsity)
            for name, s in self.sites.items()
        )
        return Report(
            self.method.to_dict(),
            rows,
            "weights",
            self.size,
            self.simulated,
            notes=notes,
            warnings=warnings,
        )

    def _remarks(self, tuner: "Tuner") -> tuple[tuple[str, ...], tuple[str, ...]]:
        head = f", the head {', '.join(tuner.method.head)} among them" if tuner.head else ""
        held = ", ".join(f"{name} {size:,} bytes" for name, size in tuner.memory().items() if size)
        notes = [
            f"{self.trained:,} parameters trained{head}: {self.share:.2%} of the model's "
            f"{self.size:,}",
            f"memory beside model and optimizer: {held}",
            *tuner.method.remarks(tuner),
        ]
        if self.undo:
            copies = sum(site.weight(self.model).nbytes for site in self.sites.values())
            notes[1] += f"; to undo what is folded, {copies:,} bytes"
        warnings: list[str] = []
        if tuner.updates < tuner.method.steps:
            warnings.append(
                f"training ended at update {tuner.updates} of {tuner.method.steps}: "
                f"the sparsity is {tuner.sparsity:.4f}"
            )
        return tuple(notes), tuple(warnings)

    def weight_bytes_saved(self) -> int:
        """Bytes of the removed weights, less a bit for each weight; none before folding."""
        saved = 0
        for name, site in self.sites.items() if self.tuner is None else ():
            item = site.weight(self.model).element_size()
            read = self.selection(name).kept * item + -(-site.size // 8)
            saved += max(0, site.size * item - read)
        return saved


@torch.no_grad()
def reattached(
    method: "Tuning", model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Tuned:
    """Take up what :meth:`Tuned.state` stored on a loaded model, whose weights are folded.

    Raises
    ------
    GossamerError
        If the model lacks a site, or has weights where its mask removes them.
    """
    known = {site.name: site for site in find_sites(model).sites}
    for name in meta["sites"]:
        if name not in known:
            raise GossamerError(f"the saved state names {name}, which this model does not have")
    sites = {name: known[name] for name in meta["sites"]}
    if not meta["folded"]:
        return _going_on(method, model, sites, meta, tensors)
    masks = {name: tensors[f"mask.{name}"] for name in sites}
    for name, site in sites.items():
        mask = unpack_bits(masks[name], site.shape).to(site.weight(model).device)
        if bool(site.weight(model)[~mask].any()):
            raise GossamerError(
                f"{name} is not zero where its saved mask removes weights; "
                "the weights were changed after saving: save the model again"
            )
    notes, warnings = tuple(meta["notes"]), tuple(meta["warnings"])
    # Nothing of the model was changed, so there is nothing to put back.
    work = Tuned(
        method,
        model,
        tuner=None,
        undo=True,
        masks=masks,
        trained=meta["trained"],
        notes=notes,
        warnings=warnings,
    )
    work.sites = sites
    return work


def _going_on(
    method: "Tuning",
    model: nn.Module,
    sites: Mapping[str, Site],
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Tuned:
    """Put the frozen matrices and the adapters beside them back in place."""
    before = {name: site.weight(model).clone() for name, site in sites.items()}
    try:
        for name, site in sites.items():
            site.write(model, tensors[f"frozen.{name}"])
        held = {k.removeprefix("tuner."): v for k, v in tensors.items() if k.startswith("tuner.")}
        state = {"method": method.to_dict(), "updates": meta["updates"], "tensors": held}
        work = Tuned(method, model, tuner=method.attach(model, undo=True, state=state), undo=True)
    except BaseException:
        for name, site in sites.items():
            site.write(model, before[name])
        raise
    work._before = before
    return work
