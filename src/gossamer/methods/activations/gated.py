"""A model at work behind gates: it measures itself, reports, undoes itself, and can be saved."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from inspect import signature
from math import fsum
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError, Method
from gossamer.kernels.measured import ChoiceRow
from gossamer.methods.activations.calibration import active_experts
from gossamer.methods.activations.execution import Execution, How, accelerate
from gossamer.methods.activations.fingerprint import fingerprint
from gossamer.methods.activations.gates import INPUT_ROLES, Gate, Gates
from gossamer.methods.activations.positions import Positions
from gossamer.models import (
    Applied,
    Inputs,
    Progress,
    Report,
    SiteMap,
    SiteRow,
    State,
    as_tokens,
    at_work,
)
from gossamer.models.capture import evaluating

__all__ = ["Beneath", "GatedModel"]


class Beneath(Protocol):
    """A change of the model itself under its gates, such as a rotation.

    Attributes
    ----------
    nbytes : weight bytes it adds to what every token reads.
    tensors : what is stored to do it again.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def tensors(self) -> dict[str, Tensor]: ...

    def plain(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with the weights as they were."""
        ...

    def original(self) -> Any:
        """While open, the model holds the weights as they were."""
        ...

    def undo(self) -> None:
        """Put the model back; a second call does nothing."""
        ...


class GatedModel(Applied):
    """A model whose activations pass gates; its weights are as they were.

    Masked-dense: the products still run over all channels, so ``simulated`` is True, until
    :meth:`accelerate` puts decode steps on kernels that skip what the gates remove.

    Attributes
    ----------
    gates : by name, what each place removes.
    measured : sparsity by name from the last :meth:`measure`, or None.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        sites: SiteMap,
        gates: Iterable[Gate],
        dense_prefix: int,
        dense_share: float = 0.0,
        *,
        beneath: Beneath | None = None,
        warnings: tuple[str, ...] = (),
        facts: tuple[str, ...] = (),
    ) -> None:
        # What is beneath must be known to the methods that are told of this one.
        self._beneath, self._warnings, self._facts = beneath, warnings, facts
        super().__init__(method, model)
        self.sites = sites
        self.measured: dict[str, float] | None = None
        self._execution: Execution | None = None
        positions = Positions(dense_prefix, dense_share)
        self._gates = Gates(model, positions)
        self._watch: list[Any] = []
        try:
            self._watch = positions.watch(model.get_submodule(sites.base))
            self._gates.set(gates)
        except BaseException:
            self._undo()
            raise
        self._join()

    @property
    def gates(self) -> dict[str, Gate]:
        """By name, what each place removes."""
        return self._gates.gates

    def _undo(self) -> None:
        """Take every hook away."""
        self._check_last("restore")
        self.decelerate()
        self._gates.remove()
        while self._watch:
            self._watch.pop().remove()
        if self._beneath is not None:
            self._beneath.undo()

    def _check_last(self, what: str) -> None:
        """Refuse what would mix rotated weights with those a later method changed."""
        works = at_work(self.model)
        if self._beneath is None or self not in works:
            return
        for later in works[works.index(self) + 1 :]:
            if later.method.card.family in ("weights", "training"):
                mine, theirs = self.method.key(), later.method.key()
                raise GossamerError(
                    f"{theirs} changed weights that {mine} had rotated; to {what}, undo {theirs} "
                    f"first, and apply it before {mine} or use transform=False"
                )

    @property
    def rewrites(self) -> bool:
        """Whether weights were changed beneath the gates."""
        return self._beneath is not None

    def accelerate(
        self,
        batch_sizes: Iterable[int] | int = (1,),
        progress: Progress | None = None,
        choice: How = "measured",
    ) -> list[ChoiceRow]:
        """Run decode steps on kernels that skip what the gates remove; ``generate`` is unchanged.

        Channel-major copies of the weights are made beside the model and dropped by
        :meth:`decelerate` or :meth:`restore`; weights must not change in between. Prefill stays
        masked dense, and so does every layer that a kernel would not make faster. A method of
        another kind that is applied later decelerates the model, with a warning in the log.

        Parameters
        ----------
        batch_sizes : rows of the decode steps that will come, one number or several, 1 to 4;
            larger ones run dense.
        choice : ``measured`` times dense and sparse for every kind of layer, ``predicted``
            believes the estimate, ``axpy`` skips channels wherever some are dropped.

        Returns
        -------
        What was chosen for every layer, with the milliseconds measured.
        """
        self.decelerate()
        batch_sizes = (batch_sizes,) if isinstance(batch_sizes, int) else batch_sizes
        self._execution = accelerate(
            self.model, self.sites, self._gates, batch_sizes, choice=choice, progress=progress
        )
        self.simulated = not self._execution.active
        return self._execution.table

    def _meet(self, other: Applied) -> None:
        """Back to masked dense before another method puts in what kernels would pass by."""
        if self._execution is None or (isinstance(other, GatedModel) and not other.rewrites):
            return
        logging.getLogger("gossamer").warning(
            "%s joins a model that %s had accelerated; it runs masked dense from here on",
            other.method.key(),
            self.method.key(),
        )
        self.decelerate()

    def decelerate(self) -> None:
        """Back to masked dense; drops what :meth:`accelerate` made."""
        if self._execution is not None:
            self._execution.remove()
        self._execution, self.simulated = None, True

    @torch.no_grad()
    def measure(self, data: Any = None, *, batch_size: int = 8) -> dict[str, float]:
        """Sparsity of every gate on data: share of channels removed over the masked tokens.

        Padding and the dense prefix are not counted.

        Parameters
        ----------
        data : see :func:`gossamer.models.as_tokens`.
        """
        data = data if isinstance(data, Inputs) else as_tokens(data, self.model)
        base = self.model.get_submodule(self.sites.base)
        names = signature(base.forward).parameters
        device = next(base.parameters()).device
        with evaluating(self.model), self.measuring():
            for batch in data.batches(batch_size, device):
                base(**{name: value for name, value in batch.items() if name in names})
        assert self.measured is not None
        return self.measured

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While open, count what every gate removes over the masked tokens of forward passes."""
        with self._gates.counting() as counts:
            yield
        self.measured = {
            name: int(counts[name][0]) / max(1, int(counts[name][1])) for name in self.gates
        }

    def state(self) -> State:
        """The cuts, where they belong, and the model they are for."""
        plain = [f.name for f in fields(Gate) if f.name not in ("cut", "low_rank")]
        gates = [{name: getattr(gate, name) for name in plain} for gate in self.gates.values()]
        tensors = {f"cut.{gate.name}": gate.cut.clone() for gate in self.gates.values()}
        for gate in self.gates.values():
            if gate.low_rank is not None:
                tensors[f"left.{gate.name}"] = gate.low_rank.left.clone()
                tensors[f"right.{gate.name}"] = gate.low_rank.right.clone()
        with nullcontext() if self._beneath is None else self._beneath.original():
            meta = {"gates": gates, "model": fingerprint(self.model, self.sites)}
        if self._beneath is not None:
            tensors |= self._beneath.tensors
        said = {"warnings": list(self._warnings), "facts": list(self._facts)}
        return State(meta | said, tensors)

    def plain(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights as they were before anything was changed beneath the gates."""
        self._check_last("save")
        return tensors if self._beneath is None else self._beneath.plain(tensors)

    def report(self) -> Report:
        """Share of the weights of every gated layer that a token does not read.

        The calibrated target, or the measured share after :meth:`measure`.
        """
        rows = tuple(
            SiteRow(gate.name, gate.role, gate.block, gate.size, self._saved(gate) / gate.size)
            for gate in self.gates.values()
        )
        return Report(
            method=self.method.to_dict(),
            rows=rows,
            unit="weight reads",
            all_size=sum(row.size for row in rows),
            simulated=self.simulated,
            notes=self._notes(),
            warnings=self._warnings,
        )

    def _saved(self, gate: Gate) -> float:
        """Weights of a gate's layers that a token does not read, as measured or calibrated."""
        if self.measured is not None:
            gate = replace(gate, sparsity=self.measured[gate.name])
        return gate.saved

    def weight_bytes_saved(self) -> int:
        """Bytes of the columns a token does not read, in the weights' own dtype.

        What must be read beside them is counted against it: low-rank paths, rotations.
        """
        return max(0, self._balance())

    def _balance(self) -> int:
        """Bytes saved, below zero where a repair or a rotation reads more than gates save."""
        gates = self.gates.values()
        saved = fsum(self._saved(gate) * self._width(gate) for gate in gates)
        return int(saved) - (self._beneath.nbytes if self._beneath else 0)

    def _width(self, gate: Gate) -> int:
        # An activation function has no weights; those it decides on lie beside it.
        path = gate.module.rpartition(".")[0] if gate.role == "mlp.neurons" else gate.module
        return next(self.model.get_submodule(path).parameters()).element_size()

    def _block_bytes(self) -> int:
        """Weight bytes a token reads in the linear layers of all blocks, dense; routers apart."""
        active = active_experts(self.model, self.sites)
        sites = [site for site in self.sites.sites if site.role in INPUT_ROLES]
        return round(
            fsum(
                site.size
                * site.weight(self.model).element_size()
                * (1.0 if site.expert is None else active)
                for site in sites
            )
        )

    def _notes(self) -> tuple[str, ...]:
        gates = self.gates.values()
        dense = self._block_bytes()
        read = dense - self._balance()
        share = read / dense if dense else 1.0
        embedding, head = self._outside()
        positions = self._gates.positions
        masked = f"the first {positions.dense_prefix} real tokens of every text are dense; "
        masked += "all others are masked"
        if share_dense := positions.dense_share:
            masked = f"the first {share_dense:.0%} of the tokens of every text are dense; "
            masked += f"the last {1 - share_dense:.0%} are masked"
        elif not positions.dense_prefix:
            masked = "every token is masked"
        notes = [
            f"weight bytes read per token: {read:,} of {dense:,} ({share:.1%}) in the linear "
            f"layers of all blocks; apart from these, embeddings hold {embedding:,} bytes "
            f"and the head {head:,}",
            masked,
            *self._facts,
        ]
        if self.measured:
            off = {gate.name: self.measured[gate.name] - gate.sparsity for gate in gates}
            worst = max(off, key=lambda name: abs(off[name]))
            notes.append(
                f"sparsities are measured; farthest from its target is {worst}: "
                f"{self.measured[worst]:.1%}, {off[worst] * 100:+.1f} points"
            )
        else:
            notes.append("sparsities are the calibrated targets; measure(data) counts them")
        if self._execution is not None:
            notes += self._execution.notes()
        return tuple(notes)

    def _outside(self) -> tuple[int, int]:
        """Bytes of the embedding tables, and of the head (tied to them or not)."""
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        head = self.model.get_submodule(self.sites.head) if self.sites.head else None
        weight: Tensor | None = getattr(head, "weight", None)
        return sum(t.nbytes for t in tables), 0 if weight is None else weight.nbytes
