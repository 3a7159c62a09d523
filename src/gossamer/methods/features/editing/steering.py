"""The protocol of methods that end in an intervention: labelled text in, steered model out."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from gossamer.core import GossamerError, Method
from gossamer.methods.features.editing.intervention import Edit, Intervention
from gossamer.models import Applied, Progress, Report, SiteRow, State, find_sites
from gossamer.models.labelled import Labelled, as_labelled

__all__ = ["Plan", "SteeredModel", "SteeringMethod", "middle_block"]


class Plan(NamedTuple):
    """What a method decided on: its edits, and facts about them in sentences."""

    edits: tuple[Edit, ...]
    notes: tuple[str, ...] = ()


class SteeredModel(Applied):
    """An intervention at work on a model.

    Attributes
    ----------
    intervention : the edits; save them alone with ``intervention.save(folder)``.
    """

    def __init__(
        self, method: Method, model: nn.Module, intervention: Intervention, notes: tuple[str, ...]
    ) -> None:
        super().__init__(method, model)
        self.intervention, self.notes = intervention, notes
        self._hooked = intervention.on(model)
        self._join()

    def _undo(self) -> None:
        self._hooked.remove()

    def state(self) -> State:
        state = self.intervention.state()
        return State({**state.meta, "notes": list(self.notes)}, state.tensors)

    def _block(self, path: str) -> int:
        try:
            blocks = find_sites(self.model).blocks
        except GossamerError:
            return -1
        return next((i for i, block in enumerate(blocks) if f"{path}.".startswith(f"{block}.")), -1)

    def report(self) -> Report:
        rows: list[SiteRow] = []
        for edit in self.intervention.edits:
            made = edit.dictionary
            wide = edit.law.units if made is None else made.d_sae
            if made is None and edit.units is not None:
                wide = _width(self.model, edit.path)
            role = "channels" if made is None else "codes"
            left = 1 - edit.law.changes / wide
            rows.append(SiteRow(edit.path, role, self._block(edit.path), wide, left))
        its = self.intervention
        last = f"strength {its.strength:g} at positions {its.positions}; the share given is that "
        notes = (*self.notes, last + "of the units left as they are, no weight is removed")
        size = sum(row.size for row in rows)
        return Report(self.method.to_dict(), tuple(rows), "units", size, True, notes)


def _width(model: nn.Module, path: str) -> int:
    """Columns of what a linear module takes (``:in``) or returns."""
    weight: Any = model.get_submodule(path.removesuffix(":in")).weight
    wide = type(model.get_submodule(path.removesuffix(":in"))).__name__ == "Conv1D"
    return int(weight.shape[1 if path.endswith(":in") != wide else 0])


def middle_block(model: nn.Module) -> str:
    """Path of the block in the middle of a transformer."""
    blocks = find_sites(model).blocks
    return blocks[len(blocks) // 2]


@dataclass(frozen=True, kw_only=True)
class SteeringMethod(Method):
    """Base of the methods that change a model's behaviour by editing its activations.

    Parameters
    ----------
    attribute : of the labelled text, that is looked at.
    target : its value to bring about (or to remove, where the method removes); None: the last.
    strength : share of the edit that is made.
    positions : tokens it is made at: ``all``, ``last``, or places such as ``0,3,4``.
    """

    subject: ClassVar[str] = "steered language model"
    exempt: ClassVar[Mapping[str, str]] = {
        "dense at sparsity 0": "the amount is a strength, not a sparsity",
    }

    attribute: str = "label"
    target: str | None = None
    strength: float = 1.0
    positions: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        Intervention((), self.strength, self.positions)

    def resolved(self, data: Labelled) -> Any:
        """This method with the open values filled in from the data."""
        data.codes(self.attribute)
        target = data.values[self.attribute][-1] if self.target is None else self.target
        data.number(self.attribute, target)
        return replace(self, target=target)

    @abstractmethod
    def plan(self, model: nn.Module, data: Labelled, progress: Progress | None = None) -> Plan:
        """Decide on the edits; the model is as before when this returns.

        Parameters
        ----------
        data : with the values that this method, resolved, names.
        """

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> SteeredModel:
        """Find the edits on labelled text and put them on the model.

        Parameters
        ----------
        data : as for :func:`gossamer.models.labelled.as_labelled`.
        """
        labelled = as_labelled(data, model)
        method = self.resolved(labelled)
        edits, notes = method.plan(model, labelled, progress)
        its = Intervention(edits, self.strength, self.positions)
        return SteeredModel(method, model, its, notes)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> SteeredModel:
        """Put stored edits on the model again."""
        its = Intervention.from_state(meta, tensors)
        return SteeredModel(self, model, its, tuple(meta["notes"]))
