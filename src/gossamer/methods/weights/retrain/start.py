"""Start: the method that makes the masks, named by key, and what takes its result over."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from gossamer import methods
from gossamer.core import GossamerError, Method, Pattern
from gossamer.methods.weights.base import Allocation, OneShot
from gossamer.methods.weights.magnitude import Magnitude
from gossamer.methods.weights.pruned import PrunedModel
from gossamer.methods.weights.retrain.states import put_back
from gossamer.models import Report, State, at_work

__all__ = ["Successor", "reattach_masks", "starting"]


def starting(
    base: str,
    sparsity: float,
    pattern: Pattern | None = None,
    allocation: Allocation | None = None,
    seed: int | None = None,
) -> OneShot:
    """The pruning method a text form names, at a sparsity.

    Parameters
    ----------
    base : such as ``"magnitude"`` or ``"random:seed=3"``.
    sparsity : an N:M pattern takes only the share it stands for.
    pattern, allocation, seed : None leaves what the text form says, or the method's own.

    Raises
    ------
    GossamerError
        If it names no method that prunes in one pass.
    """
    key = methods.split_text(base)[0]
    cls = methods.get(key)
    if not issubclass(cls, OneShot):
        known = [k for k in methods.keys("weights") if issubclass(methods.get(k), OneShot)]
        raise GossamerError(
            f"base is {base!r}, which does not prune weights in one pass; "
            f"choose from {', '.join(known)}"
        )
    given = {"sparsity": sparsity, "pattern": pattern, "allocation": allocation, "seed": seed}
    made = methods.parse_method(base, **given)
    assert isinstance(made, OneShot)
    return made


def reattach_masks(
    model: Any, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> PrunedModel:
    """Take up stored masks; the weights already hold the zeros."""
    return Magnitude().reattach(model, meta, tensors)


class Successor(PrunedModel):
    """A pruned model that goes on under the name of the method that asked for the masks.

    Parameters
    ----------
    method : under whose name. work : the pruning it takes over; it is no longer at work itself.
    before : parameters and buffers of the dense model where more changed than was pruned.
    notes : facts for the report. warnings : what a user must know. facts : JSON-able, saved along.
    """

    def __init__(
        self,
        method: Method,
        work: PrunedModel,
        *,
        before: Mapping[str, Tensor] | None = None,
        notes: Sequence[str] = (),
        warnings: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if work in at_work(work.model):
            work.forget()
        super().__init__(method, work.model, undo=work.undo or before is not None)
        self.sites, self.kept, self.masks = work.sites, work.kept, work.masks
        self.warnings = [*work.warnings, *warnings]
        self._removed = work._removed
        self.before = before
        self.notes = tuple(notes)
        self.facts = dict(facts or {})

    def _undo(self) -> None:
        before, self._removed = self.before, {} if self.before is not None else self._removed
        super()._undo()
        if before is not None:
            put_back(self.model, before)
            self.before = None

    def state(self) -> State:
        held = super().state()
        return State({**held.meta, "notes": list(self.notes), "facts": self.facts}, held.tensors)

    def report(self) -> Report:
        return replace(super().report(), notes=self.notes)
