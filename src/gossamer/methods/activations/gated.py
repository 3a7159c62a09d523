"""A model at work behind gates: it measures itself, reports, undoes itself, and can be saved."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from inspect import signature
from math import fsum
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import Method
from gossamer.methods.activations.gates import Gate, Gates
from gossamer.methods.activations.positions import Positions
from gossamer.models import Applied, Inputs, Report, SiteMap, SiteRow, State, as_tokens
from gossamer.models.capture import evaluating

__all__ = ["GatedModel"]


class GatedModel(Applied):
    """A model whose activations pass gates; its weights are as they were.

    Masked-dense: the products still run over all channels, so ``simulated`` is True.

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
    ) -> None:
        super().__init__(method, model)
        self.sites = sites
        self.measured: dict[str, float] | None = None
        positions = Positions(dense_prefix)
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
        self._gates.remove()
        while self._watch:
            self._watch.pop().remove()

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
        """The cuts, and where they belong."""
        plain = [f.name for f in fields(Gate) if f.name != "cut"]
        meta = [{name: getattr(gate, name) for name in plain} for gate in self.gates.values()]
        tensors = {f"cut.{gate.name}": gate.cut.clone() for gate in self.gates.values()}
        return State({"gates": meta}, tensors)

    def report(self) -> Report:
        """Share of the weights of every gated layer that a token does not read.

        The calibrated target, or the measured share after :meth:`measure`.
        """
        found = self.measured or {gate.name: gate.sparsity for gate in self.gates.values()}
        rows = tuple(
            SiteRow(gate.name, gate.role, gate.block, gate.size, found[gate.name])
            for gate in self.gates.values()
        )
        return Report(
            method=self.method.to_dict(),
            rows=rows,
            unit="weight reads",
            all_size=sum(row.size for row in rows),
            simulated=self.simulated,
            notes=self._notes(),
        )

    def weight_bytes_saved(self) -> int:
        """Bytes of the columns a token does not read, in the weights' own dtype."""
        found = self.measured or {gate.name: gate.sparsity for gate in self.gates.values()}
        return int(
            fsum(found[g.name] * g.size * self._width(g.module) for g in self.gates.values())
        )

    def _width(self, module: str) -> int:
        return next(self.model.get_submodule(module).parameters()).element_size()

    def _notes(self) -> tuple[str, ...]:
        gates = self.gates.values()
        dense = sum(gate.size * self._width(gate.module) for gate in gates)
        read = dense - self.weight_bytes_saved()
        share = read / dense if dense else 1.0
        embedding, head = self._outside()
        prefix = self._gates.positions.dense_prefix
        notes = [
            f"weight bytes read per token: {read:,} of {dense:,} ({share:.1%}) in the gated "
            f"layers; apart from these, embeddings hold {embedding:,} bytes and the head {head:,}",
            f"the first {prefix} real tokens of every text are dense; all others are masked",
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
        return tuple(notes)

    def _outside(self) -> tuple[int, int]:
        """Bytes of the embedding tables, and of the head (tied to them or not)."""
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        head = self.model.get_submodule(self.sites.head) if self.sites.head else None
        weight: Tensor | None = getattr(head, "weight", None)
        return sum(t.nbytes for t in tables), 0 if weight is None else weight.nbytes
