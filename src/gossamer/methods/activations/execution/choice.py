"""Which form each gated layer runs in: predicted first, then measured, dense when it would lose."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from gossamer.kernels.gather_gemv.native import linear_of
from gossamer.kernels.gather_gemv.op import run_linear
from gossamer.kernels.gather_gemv.rows import Rows, rows
from gossamer.kernels.measured import DENSE, Choice, ChoiceRow, fastest
from gossamer.methods.activations.execution.decide import bandwidth, predict
from gossamer.methods.activations.gates import Gate

__all__ = ["Chooser", "How"]

How = Literal["measured", "predicted", "axpy"]


def _zeros(size: int, sparsity: float, count: int) -> Tensor:
    """(count, size) inputs of which each row holds that share of zeros, in places of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, size, generator=generator) + 0.5
    dropped = round(sparsity * size)
    order = torch.rand(count, size, generator=generator).argsort(1)
    return x.scatter_(1, order[:, :dropped], 0.0)


@dataclass
class Chooser:
    """Decides layer by layer and remembers the rows of the table.

    Parameters
    ----------
    batch : the most rows of x the layers will see.
    how : ``measured`` times the candidates, ``predicted`` believes the prediction, ``axpy`` takes
        it wherever channels are dropped.
    """

    batch: int
    how: How = "measured"
    table: list[ChoiceRow] = field(default_factory=list)
    _found: dict[tuple[object, ...], Choice] = field(default_factory=dict)

    @property
    def span(self) -> str:
        """The rows it decides for, as text."""
        return "1" if self.batch == 1 else f"1 to {self.batch}"

    def layer(
        self, name: str, weight: Tensor, bias: Tensor | None, gate: Gate | None
    ) -> Rows | None:
        """The layer's rows, channel-major where skipping channels wins; None where dense is best.

        Parameters
        ----------
        weight : (O, I); may be a transposed view. A dense layer is read where it lies.
        """
        shape = (weight.shape[0], weight.shape[1])
        if gate is None or gate.sparsity <= 0:
            return None
        sparsity = round(gate.sparsity, 2)
        expected = predict(
            shape, sparsity, self.batch, rate=bandwidth(), width=weight.element_size()
        )
        made: list[Rows] = []

        def channel_major() -> Rows:
            if not made:
                made.append(rows(weight, bias))
            return made[0]

        key = (shape, weight.dtype, sparsity)
        if self.how == "axpy":
            choice = Choice("axpy", expected.milliseconds)
        elif expected.best(DENSE, "axpy") == DENSE or self.how == "predicted":
            choice = Choice(expected.best(DENSE, "axpy"), expected.milliseconds)
        else:
            if key not in self._found:
                self._found[key] = self._time(weight, bias, sparsity, channel_major)
            choice = self._found[key]
        self.table.append(ChoiceRow(name, shape, self.span, choice.name, choice.milliseconds))
        logging.getLogger("gossamer").info(
            "%s: %s; predicted ms: %s; measured ms: %s",
            name,
            choice.name,
            ", ".join(f"{form} {ms:.3f}" for form, ms in expected.milliseconds.items()),
            ", ".join(f"{form} {ms:.3f}" for form, ms in choice.milliseconds.items()),
        )
        return channel_major() if choice.name == "axpy" else None

    def _time(
        self,
        weight: Tensor,
        bias: Tensor | None,
        sparsity: float,
        channel_major: Callable[[], Rows],
    ) -> Choice:
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
        x = _zeros(weight.shape[1], sparsity, self.batch)
        sparse = linear_of(channel_major(), torch.zeros(1))
        plain = linear_of(rows(weight, bias, major="output"))
        typed = x.to(weight.dtype)
        size = weight.shape[0]
        # Dense is the faster of ours and the library's.
        library = fastest(
            f"dense linear {tuple(weight.shape)} {weight.dtype} {self.batch}",
            {DENSE: lambda: linear(typed, weight, bias), "dot": lambda: run_linear(plain, x, size)},
            device="cpu",
            margin=0.0,
            repeats=7,
            seconds=0.5,
        )
        dense = (
            (lambda: run_linear(plain, x, size))
            if library.name == "dot"
            else (lambda: linear(typed, weight, bias))
        )
        return fastest(
            f"axpy {tuple(weight.shape)} {weight.dtype} {self.batch} {sparsity}",
            {DENSE: dense, "axpy": lambda: run_linear(sparse, x, size)},
            device="cpu",
            repeats=7,
            seconds=0.5,
        )
