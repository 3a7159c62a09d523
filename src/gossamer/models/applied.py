"""Applied: a method at work on a model. It reports, undoes itself, and can be saved."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from math import fsum
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from gossamer.core import GossamerError, Method

__all__ = ["ACCELERATED", "Applied", "Report", "SiteRow", "State", "at_work"]


@dataclass(frozen=True)
class State:
    """What restores a method on a freshly loaded model, without data.

    Parameters
    ----------
    meta : JSON-able values. tensors : name to tensor (masks packed to one bit, thresholds ...).
    """

    meta: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteRow:
    """Sparsity of one site.

    Parameters
    ----------
    size : what the sparsity is a share of: weights of a matrix, causal pairs of a map, latents.
    """

    name: str
    role: str
    block: int
    size: int
    sparsity: float


@dataclass(frozen=True)
class Report:
    """What a method did, site by site.

    Parameters
    ----------
    method : the method as plain values. rows : one per site.
    unit : what is counted: ``weights``, ``input channels``, ``attention pairs``, ``latents``.
    all_size : parameters of the whole model where the unit is weights, else the rows' total.
    simulated : the arithmetic still runs densely; no speed or memory is gained yet.
    notes : further facts in sentences. warnings : what a user must know of before relying on it.
    """

    method: dict[str, Any]
    rows: tuple[SiteRow, ...]
    unit: str
    all_size: int
    simulated: bool
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Total size of the sites."""
        return sum(row.size for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share removed over the sites, weighted by their size."""
        return fsum(r.sparsity * r.size for r in self.rows) / self.size if self.size else 0.0

    @property
    def sparsity_all(self) -> float:
        """Share removed over the whole model."""
        gone = fsum(r.sparsity * r.size for r in self.rows)
        return gone / self.all_size if self.all_size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        values = asdict(self)
        return {**values, "sparsity": self.sparsity, "sparsity_all": self.sparsity_all}

    def __str__(self) -> str:
        head = f"{_words(self.method)}: {self.sparsity:.2%} of {self.size:,} {self.unit} removed"
        if self.unit == "weights":
            head += f", {self.sparsity_all:.2%} of all {self.all_size:,} parameters"
        if self.simulated:
            head += "; simulated: runs dense"
        wide = max((len(r.name) for r in self.rows), default=0)
        lines = [f"  {r.name:<{wide}}  {r.sparsity:7.2%} of {r.size:>12,}" for r in self.rows]
        facts = [f"  note: {n}" for n in self.notes] + [f"  warning: {w}" for w in self.warnings]
        return "\n".join([head, *lines, *facts])


def _words(method: Mapping[str, Any]) -> str:
    """A method's plain values in words; one that holds methods shows theirs."""
    shown = {
        name: _words(value) if isinstance(value, Mapping) and "method" in value else value
        for name, value in method.items()
        if name != "method" and value not in (None, "")
    }
    return f"{method.get('method', '?')} ({', '.join(f'{k} {v}' for k, v in shown.items())})"


_AT_WORK = "_gossamer_at_work"
ACCELERATED = "_gossamer_accelerated"
"""Where a model holds what runs its layers on other kernels, to be undone before weights change."""


def at_work(model: nn.Module) -> tuple["Applied", ...]:
    """The methods now at work on a model, in the order they were applied."""
    return tuple(vars(model).get(_AT_WORK, ()))


class Applied(ABC):
    """A method at work on a model; a context manager that restores the model on exit.

    Attributes
    ----------
    method : the method, resolved: every parameter that was left open has its value.
    model : the model it works on.
    simulated : the arithmetic still runs densely, so no speed may be claimed.
    """

    simulated: bool = True

    def __init__(self, method: Method, model: nn.Module) -> None:
        if ACCELERATED in vars(model):
            raise GossamerError(
                "the model is accelerated; call restore() of what accelerate returned, apply the "
                "method, then accelerate again"
            )
        self.method = method
        self.model = model
        for work in at_work(model):
            work._meet(self)

    def _meet(self, other: "Applied") -> None:
        """Another method is about to change the model this one is at work on."""
        return

    def _join(self) -> None:
        """Count as at work on the model from now on: the last step of every constructor."""
        # On the model itself, so that the list lives and dies with it.
        vars(self.model).setdefault(_AT_WORK, []).append(self)

    def restore(self) -> None:
        """Put the model back exactly as it was. A second call does nothing.

        An accelerated model gets its own layers back first.

        Raises
        ------
        GossamerError
            If the method was applied without keeping what undoing needs, or a later one rewrote
            the weights.
        """
        if self in (works := at_work(self.model)):
            later = [work for work in works[works.index(self) + 1 :] if work.rewrites]
            if later:
                raise GossamerError(
                    f"{later[-1].method.key()} rewrote the weights later; restore that first"
                )
            if (faster := vars(self.model).get(ACCELERATED)) is not None:
                faster.restore()
            self._undo()
            self._leave()

    def _leave(self) -> None:
        """Take this method off the list of those at work on the model."""
        works = vars(self.model)[_AT_WORK]
        works.remove(self)
        if not works:
            del vars(self.model)[_AT_WORK]

    @property
    def rewrites(self) -> bool:
        """Whether undoing writes back weights as an earlier method had left them."""
        return False

    @abstractmethod
    def _undo(self) -> None:
        """Undo everything; called once."""

    @abstractmethod
    def state(self) -> State:
        """What ``method.reattach`` needs on the saved model."""

    @abstractmethod
    def report(self) -> Report:
        """What was removed, site by site."""

    def measuring(self) -> AbstractContextManager[None]:
        """While open, forward passes are counted; :meth:`report` then says what was measured.

        For methods whose sparsity depends on the data; for all others nothing changes.
        """
        return nullcontext()

    def weight_bytes_saved(self) -> int:
        """Weight bytes per decoded token that a kernel which skips what was removed need not read.

        Counts what such a kernel must read instead (masks, indices); never negative.
        """
        return 0

    def plain(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors as its own architecture names and shapes them, for saving.

        For methods that put other modules in place of the model's own; for all others the
        mapping itself is returned.

        Parameters
        ----------
        tensors : state dict of the model, as the methods applied later have left it.
        """
        return tensors

    def save(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Write the model with all methods at work on it: see :func:`gossamer.models.store.save`.

        Raises
        ------
        GossamerError
            If this method was restored, or the folder holds something.
        """
        from gossamer.models.store import save

        if self not in at_work(self.model):
            raise GossamerError(f"{self.method.key()} was restored; apply it again before saving")
        return save(self.model, folder, tokenizer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()
