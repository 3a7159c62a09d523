"""Proximal sparse coding in V1: other thresholds than soft give sparser codes of natural images.

A dictionary of patches is learned with the codes that one penalty's proximal operator finds. l1
shrinks what it keeps and needs many coefficients to make up for it; l0 and what lies between do
not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, Method, check_count, unknown
from gossamer.methods.features.vision.coder import PENALTIES, Penalty, SparseCoder
from gossamer.methods.features.vision.fields import gabor_like
from gossamer.methods.features.vision.patches import natural_patches
from gossamer.models import Applied, Progress, Report, SiteRow, State

__all__ = ["CodedPatches", "V1SparseCoding"]

_PATCHES = 20_000
_SCORED = 2048


@dataclass(frozen=True, kw_only=True)
class V1SparseCoding(Method):
    """Learn the atoms of natural patches under a chosen penalty.

    ``apply`` takes a :class:`SparseCoder` and patches (N, P²), by default of scikit-learn's
    bundled photographs (decoding them needs Pillow: ``pip install pillow``)::

        coder = SparseCoder(144, 288)
        applied = V1SparseCoding(penalty="hard").apply(coder)
        print(applied.report())

    ``gossamer.report.receptive_fields`` draws the atoms.

    Parameters
    ----------
    penalty : ``soft``, ``hard``, ``cel0``, ``half`` or ``group``; see :class:`SparseCoder`.
    weight : λ, >= 0, for pixels of variance 1.
    updates : of the atoms. batch_size : patches of an update, at most those there are.
    lr : share of the way to the atom that suits an update's codes best, above 0, at most 1; it
        falls linearly to 0.
    steps : proximal steps of a code. group_size : neighbours that ``group`` switches together.
    seed : of the order of the patches and of those that replace unused atoms.

    Source: arXiv 2301.10002 (PLOS Computational Biology 2023), methods.

    Departs from the paper: an atom's step is divided by the energy of its coefficients in the
    batch; atoms that no patch of the last tenth of the updates used restart at a patch; codes
    under penalties that are not convex start at one of l1, not at zero; convex ones are
    accelerated; ``group`` is ours.
    """

    card: ClassVar[Card] = Card(
        title="Beyond ell_1 sparse coding in V1",
        year=2023,
        arxiv="2301.10002",
        system="v1_sparse_coding",
        family="features",
        when="during training",
        start="dense",
        masks="dynamic",
        site="coefficients of an image patch",
        score="coefficient after a gradient step",
        pattern="unstructured or groups, per patch",
        budget="emergent: the weight of a penalty",
        schedule="rate falls to 0",
        update="learned dictionary",
        kernel="core.prox",
        departs="atom steps scaled by coefficient energy; unused atoms restart; starts at l1 for "
        "penalties that are not convex",
    )
    subject: ClassVar[str] = "natural patches"
    example: ClassVar[Mapping[str, Any]] = {
        "updates": 10,
        "batch_size": 64,
        "steps": 15,
        "weight": 1.0,
    }
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "the amount is a penalty's weight, not a sparsity",
    }

    penalty: Penalty = "hard"
    weight: float = 4.0
    updates: int = 500
    batch_size: int = 256
    lr: float = 0.2
    steps: int = 50
    group_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty not in get_args(Penalty):
            raise unknown("penalty", self.penalty, PENALTIES)
        if not 0 <= self.weight < float("inf"):
            raise GossamerError(f"weight is {self.weight!r}; give a number, at least 0")
        if not 0 < self.lr <= 1:
            raise GossamerError(f"lr is {self.lr!r}; give a share above 0, at most 1")
        for name in ("updates", "batch_size", "steps", "group_size"):
            check_count(name, getattr(self, name), 1)

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> "CodedPatches":
        """Train the coder's atoms, in place.

        Parameters
        ----------
        model : a :class:`SparseCoder`. data : patches (N, D), or None for natural ones.

        Raises
        ------
        GossamerError
            If the model is no sparse coder, or the patches do not fit it or are not finite.
        """
        coder = _coder(model)
        patches = _patches(data, coder, self.seed)
        before = _Settings.of(coder)
        atoms = coder.atoms.detach().clone()
        try:
            self._configure(coder)
            self._train(coder, patches, progress)
            scored = coder.codes(patches[:_SCORED])
        except BaseException:
            before.put(coder)
            coder.atoms.data.copy_(atoms)
            raise
        kept, x = scored != 0, patches[:_SCORED]
        figures = {
            "l0": float(kept.float().sum(1).mean()),
            "fvu": float((x - scored @ coder.atoms).square().sum() / x.square().sum()),
            "unused": float((~kept.any(0)).float().mean()),
        }
        return CodedPatches(self, coder, before, atoms, figures)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "CodedPatches":
        """Put stored atoms into a coder."""
        coder = _coder(model)
        before, atoms = _Settings.of(coder), coder.atoms.detach().clone()
        self._configure(coder)
        coder.atoms.data.copy_(tensors["atoms"])
        return CodedPatches(self, coder, before, atoms, dict(meta["figures"]))

    def _configure(self, coder: SparseCoder) -> None:
        coder.configure(self.penalty, self.weight, self.steps, self.group_size)

    def _train(self, coder: SparseCoder, patches: Tensor, progress: Progress | None) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        size, every = min(self.batch_size, len(patches)), max(1, self.updates // 10)
        atoms, used = coder.atoms.data, torch.zeros(len(coder.atoms), dtype=torch.bool)
        for done in range(self.updates):
            x = patches[torch.randint(len(patches), (size,), generator=generator)]
            code = coder.codes(x)
            used |= (code != 0).any(0)
            error = x - code @ atoms
            energy = code.square().sum(0)
            # The usual step for a coefficient energy of its own; atoms seldom used move less.
            step = code.T @ error / (energy + energy.mean() + 1e-6)[:, None]
            rate = self.lr * (1 - done / self.updates)
            atoms.copy_(nn.functional.normalize(atoms + rate * step, dim=1))
            # The last stretch only refines, so that every atom there is has been trained.
            if (done + 1) % every == 0 and done + every < self.updates:
                self._restart(atoms, used, patches, generator)
                used.zero_()
            if progress is not None:
                fvu = float(error.square().sum() / x.square().sum())
                progress(done + 1, self.updates, f"atoms, FVU {fvu:.3f}")

    @staticmethod
    def _restart(atoms: Tensor, used: Tensor, patches: Tensor, generator: torch.Generator) -> None:
        idle = (~used).nonzero()[:, 0]
        fresh = patches[torch.randint(len(patches), (len(idle),), generator=generator)]
        atoms[idle] = nn.functional.normalize(fresh, dim=1)


class CodedPatches(Applied):
    """A sparse coder with learned atoms.

    Attributes
    ----------
    figures : ``l0`` coefficients a patch, ``fvu`` and ``unused`` share of atoms, on patches that
        it was trained on.
    """

    def __init__(
        self,
        method: V1SparseCoding,
        model: SparseCoder,
        before: "_Settings",
        atoms: Tensor,
        figures: dict[str, float],
    ) -> None:
        super().__init__(method, model)
        self.coder, self.figures = model, figures
        self._before, self._atoms = before, atoms
        self._join()

    def oriented(self) -> float:
        """Share of the atoms that are oriented and look like a Gabor function (R² above 0.6)."""
        return float(gabor_like(self.coder.atoms).float().mean())

    @property
    def rewrites(self) -> bool:
        return True

    def _undo(self) -> None:
        self._before.put(self.coder)
        self.coder.atoms.data.copy_(self._atoms)

    def state(self) -> State:
        return State({"figures": self.figures}, {"atoms": self.coder.atoms.detach().clone()})

    def report(self) -> Report:
        count, figures = len(self.coder.atoms), self.figures
        row = SiteRow("atoms", "codes", -1, count, 1 - figures["l0"] / count)
        notes = (
            f"{figures['l0']:.1f} of {count} coefficients a patch, FVU {figures['fvu']:.3f}, "
            f"{figures['unused']:.1%} of the atoms unused",
            "oriented() says how many atoms are Gabor-like; "
            "gossamer.report.receptive_fields draws them",
        )
        return Report(self.method.to_dict(), (row,), "coefficients", count, True, notes)


@dataclass(frozen=True)
class _Settings:
    """How a coder finds codes."""

    penalty: Penalty
    weight: float
    steps: int
    group_size: int

    @classmethod
    def of(cls, coder: SparseCoder) -> "_Settings":
        return cls(coder.penalty, coder.weight, coder.steps, coder.group_size)

    def put(self, coder: SparseCoder) -> None:
        coder.configure(self.penalty, self.weight, self.steps, self.group_size)


def _coder(model: nn.Module) -> SparseCoder:
    if not isinstance(model, SparseCoder):
        raise GossamerError(
            f"the model is a {type(model).__name__}; v1_sparse_coding takes a SparseCoder, from "
            "gossamer.methods.features.vision"
        )
    return model


def _patches(data: Any, coder: SparseCoder, seed: int) -> Tensor:
    pixels = coder.atoms.shape[1]
    if data is None:
        side = round(pixels**0.5)
        if side * side != pixels:
            raise GossamerError(f"the coder reads {pixels} pixels, no square; give patches as data")
        data = natural_patches(_PATCHES, side, seed=seed)
    if not isinstance(data, Tensor) or data.dim() != 2 or data.shape[1] != pixels:
        found = tuple(data.shape) if isinstance(data, Tensor) else type(data).__name__
        raise GossamerError(f"patches are {found}; this coder takes a tensor (N, {pixels})")
    if not len(data) or not bool(torch.isfinite(data).all()):
        raise GossamerError("patches hold NaN or infinity, or there are none; leave those out")
    return data.to(coder.atoms.dtype)
