"""A model that a method trained to be sparse: it measures itself, undoes itself, can be saved."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import Method
from gossamer.methods.activations.training.fatrelu import FATReLU
from gossamer.methods.activations.training.hidden import (
    Activity,
    HiddenUnits,
    hidden_units,
    measure_activity,
)
from gossamer.models import Applied, Inputs, Report, SiteRow, State, Tokens, as_tokens

__all__ = ["TrainedModel", "as_data", "keep_weights"]


def as_data(data: Any, model: nn.Module) -> Tokens | Inputs:
    """Training data as samples: ready-made inputs as they are, everything else as tokens."""
    return data if isinstance(data, Inputs) else as_tokens(data, model)


def keep_weights(parameters: Mapping[str, Tensor]) -> Callable[[], None]:
    """Remember values now; calling what is returned writes them back."""
    kept = {name: (tensor, tensor.detach().clone()) for name, tensor in parameters.items()}

    @torch.no_grad()
    def back() -> None:
        for tensor, value in kept.values():
            tensor.copy_(value)

    return back


class TrainedModel(Applied):
    """A model whose weights were trained towards sparse hidden activations.

    The zeros are computed densely, so ``simulated`` is True; kernels that skip them read what
    :meth:`weight_bytes_saved` counts less.

    Parameters
    ----------
    undo : closed by ``restore``; puts weights and modules back.
    activity : measured per layer, as by :func:`measure_activity`.
    tolerance : size up to which an entry counted as zero.
    gate_zeros : a rule puts the zeros at the activation function's output, so that a kernel knows
        them before it reads the up projection, as it does behind ReLU.
    losses : training loss of every step; empty after loading.

    Attributes
    ----------
    activity : from training, or the last :meth:`measure`.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        undo: ExitStack,
        activity: Mapping[str, Activity],
        *,
        tolerance: float = 0.0,
        gate_zeros: bool = False,
        losses: tuple[float, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(method, model)
        self.activity = dict(activity)
        self.tolerance = tolerance
        self._gate_zeros = gate_zeros
        self.losses = losses
        self._undo_stack = undo
        self._units: tuple[HiddenUnits, ...] = hidden_units(model)
        self._extra = notes
        self._join()

    def _undo(self) -> None:
        """Put weights and modules back."""
        self._undo_stack.close()

    def measure(self, data: Any = None, *, batch_size: int = 8) -> dict[str, Activity]:
        """Non-zero and live shares of every layer on data; :meth:`report` then shows these."""
        self.activity = measure_activity(
            self.model,
            as_data(data, self.model),
            tolerance=self.tolerance,
            batch_size=batch_size,
        )
        return self.activity

    def state(self) -> State:
        """The shares measured; the weights are the model's own."""
        activity = {name: asdict(value) for name, value in self.activity.items()}
        return State({"activity": activity, "tolerance": self.tolerance})

    @staticmethod
    def activity_of(meta: Mapping[str, Any]) -> dict[str, Activity]:
        """What :meth:`state` stored of the shares measured."""
        return {name: Activity(**values) for name, values in meta["activity"].items()}

    def weight_bytes_saved(self) -> int:
        """Bytes of the rows and columns behind exact zeros, in the weights' own dtype.

        Up rows count only where the gate itself is zero; a product of a gate that never is (SiLU)
        is known after both are read. Entries below a tolerance are not zero, and are read.
        """
        return round(
            sum(
                self._zeros(unit) * self._readers(unit) * self._width(unit)
                for unit in self._units
                if unit.tap.name in self.activity
            )
        )

    def _zeros(self, unit: HiddenUnits) -> float:
        found = self.activity[unit.tap.name]
        if found.exact is not None:
            return 1.0 - found.exact
        return 0.0 if self.tolerance else 1.0 - found.nonzero

    def _readers(self, unit: HiddenUnits) -> int:
        functions = (self.model.get_submodule(path) for path in unit.functions)
        early = all(isinstance(function, nn.ReLU | FATReLU) for function in functions)
        return unit.readers if early or self._gate_zeros else unit.tap.size

    def _width(self, unit: HiddenUnits) -> int:
        return next(self.model.get_submodule(unit.tap.module).parameters()).element_size()

    def report(self) -> Report:
        """Share of zero hidden activations of every layer, averaged over tokens."""
        rows = tuple(
            SiteRow(
                unit.tap.name,
                unit.tap.role,
                unit.tap.block,
                unit.tap.features,
                1.0 - self.activity[unit.tap.name].nonzero,
            )
            for unit in self._units
            if unit.tap.name in self.activity
        )
        live = [a.live for a in self.activity.values() if a.live is not None]
        counted = f"|a| <= {self.tolerance:g}" if self.tolerance else "exact zeros"
        notes = [
            f"counted as zero: {counted}, of the vector that enters the down projection",
            *self._extra,
        ]
        if live:
            notes.append(f"at least {min(live):.1%} of a layer's units were active for some token")
        return Report(
            method=self.method.to_dict(),
            rows=rows,
            unit="hidden activations",
            all_size=sum(row.size for row in rows),
            simulated=self.simulated,
            notes=tuple(notes),
        )
